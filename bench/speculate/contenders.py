"""What is measured side by side: the engine without speculation, and with each method and number of drafts.

One engine serves several numbers of drafts where all of them are compiled into it: what differs between contenders is then the policy
that chooses the number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quire.backends.base import Backend
from quire.engine import LLM
from quire.engine.draft_controller import DraftController
from quire.engine.draft_scheduler import CatchUpAccount, DraftPolicy, FixedDrafts
from quire.engine.speculation import SpeculativeConfig

NO_SPECULATION = "none"


@dataclass(frozen=True)
class Experience:
    """What an engine has learned of drafts. Contenders that share an engine have each their own."""

    policy: DraftPolicy
    account: CatchUpAccount


@dataclass(frozen=True)
class Contender:
    """An engine, and how it speculates: `num_drafts` tokens a round, None for as many as it finds worthwhile."""

    method: str
    num_drafts: int | None
    llm: LLM
    is_control: bool = False
    """Whether it is there only to show how far an engine is from another one like it."""

    @property
    def name(self) -> str:
        """For people, and to find its records by."""
        if self.method == NO_SPECULATION:
            return f"{self.method} again" if self.is_control else self.method
        return f"{self.method} {'adaptive' if self.num_drafts is None else f'K={self.num_drafts}'}"

    def new_experience(self) -> Experience | None:
        """Of one that has served nothing yet; None without speculation."""
        if self.method == NO_SPECULATION:
            return None
        if self.num_drafts is None:
            return Experience(DraftController((0, *self.llm.core.config.draft_counts)), CatchUpAccount())
        return Experience(FixedDrafts(self.num_drafts), CatchUpAccount())

    def use(self, experience: Experience | None) -> None:
        """Has the engine go by this from the next request on, and add to it. The engine must be idle."""
        assert not self.llm.core.has_work, "requests carry what a policy remembers of them"
        drafts = self.llm.core.scheduler.drafts
        assert (drafts is None) == (experience is None), self
        if drafts is not None and experience is not None:
            drafts.go_by(experience.policy, experience.account)


@dataclass(frozen=True)
class Setup:
    """Which models, and how they may speculate."""

    model: str
    draft_models: dict[str, str]
    """What drafts, for the methods that load something."""
    methods: tuple[str, ...]
    draft_counts: tuple[int, ...]
    is_adaptive: bool
    arguments: dict[str, Any]
    """Of every engine."""
    backend: Backend | None = None
    """In the place of the one that the arguments name."""

    def speculative_config(self, method: str, num_drafts: int) -> dict[str, Any]:
        """With up to so many drafts, and all numbers below that the engine compiles with it."""
        config: dict[str, Any] = {"method": method, "num_speculative_tokens": num_drafts, "adaptive": True}
        return {**config, "model": self.draft_models[method]} if method in self.draft_models else config

    def make(self, say: Callable[[str], None]) -> list[Contender]:
        """Loads and compiles every engine that is needed; the first contender is the one without speculation, the second its control."""

        def engine(config: dict[str, Any] | None) -> LLM:
            say(f"starting {self.model}, {'no speculation' if config is None else config}")
            return LLM(self.model, backend=self.backend, speculative_config=config, **self.arguments)

        plain, again = engine(None), engine(None)
        found = [Contender(NO_SPECULATION, 0, plain), Contender(NO_SPECULATION, 0, again, is_control=True)]
        most = plain.core.capabilities.num_draft_counts
        for method in self.methods:
            for idx, counts in enumerate(shared_engines(self.draft_counts, most)):
                llm = engine(self.speculative_config(method, counts[-1]))
                found += [Contender(method, count, llm) for count in counts]
                if idx == 0 and self.is_adaptive:
                    found.append(Contender(method, None, llm))
        return found


def shared_engines(draft_counts: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """The numbers of drafts in groups, each of which one engine compiles, that of the largest number first; ascending in each.

    `most` is how many numbers an engine compiles.
    """
    left, groups = sorted(set(draft_counts)), []
    while left:
        compiled = SpeculativeConfig("ngram", num_speculative_tokens=left[-1]).draft_counts(most)
        groups.append(tuple(count for count in left if count in compiled))
        left = [count for count in left if count not in compiled]
    return groups
