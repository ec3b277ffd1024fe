"""What users are expected to send: workloads as data, and the requests that they make of a seed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from quire.kernels.errors import InvalidConfigError

PERCENTILES = (50, 95, 99)
METRICS = ("first_token", "between_tokens", "device_busy", "baseline")
FIRST_WORD = 1000
"""Token ids from here on are words of prompts; what lies below may mean something to a model."""


class Arrival(NamedTuple):
    """A request on its way."""

    time: float
    """In seconds since the start."""
    prompt: tuple[int, ...]
    max_tokens: int
    user: int = 0


@dataclass(frozen=True)
class Spikes:
    """Times at which everybody writes more often."""

    first: float
    """When the first begins, in seconds."""
    every: float
    lasts: float
    factor: float

    def factor_at(self, moment: float) -> float:
        """How many times more often than usual."""
        since = moment - self.first
        return self.factor if since >= 0 and since % self.every < self.lasts else 1.0


@dataclass(frozen=True)
class Lengths:
    """Tokens of an output: log-normal around `median`, or anything from `least` to `most` alike."""

    most: int
    least: int = 1
    median: float | None = None
    sigma: float = 0.5

    def draw(self, random: np.random.Generator) -> int:
        """One of them."""
        if self.median is None:
            return int(random.integers(self.least, self.most + 1))
        return int(np.clip(round(self.median * math.exp(self.sigma * random.normal())), self.least, self.most))


@dataclass(frozen=True)
class Promise:
    """What is kept or not."""

    metric: str
    percentile: int = 95
    seconds: float = 0.0
    """At most so many, of first_token and between_tokens."""
    share: float = 0.0
    """Of the time between the first request and the last answer, device_busy at least."""
    times: float = 1.0
    """Of the baseline's figures, at most; its throughput is to be at least the inverse."""

    def describe(self) -> str:
        """For people."""
        if self.metric == "device_busy":
            return f"devices busy at least {self.share:.0%} of the time"
        if self.metric == "baseline":
            return f"p95 and throughput within {self.times - 1:.0%} of the run it is compared with"
        return f"{self.metric.replace('_', ' ')} p{self.percentile} under {self.seconds:g} s"


@dataclass(frozen=True)
class Workload:
    """One of three kinds, by which of its numbers is given: users who wait and think, documents at once, or requests at a rate."""

    name: str
    title: str
    prompt_tokens: tuple[int, int]
    """Fewest and most."""
    output_tokens: Lengths
    promise: Promise
    users: int | None = None
    documents: int | None = None
    requests_per_s: float | None = None
    log: tuple[tuple[float, int, int], ...] | None = None
    """What was recorded: seconds since the start, prompt tokens, output tokens."""
    duration_seconds: float = 600.0
    """Nobody sends anything later."""
    think_seconds: float = 0.0
    """Mean time between an answer and the user's next message."""
    shared_prefix_tokens: int = 0
    """That all prompts begin with."""
    spikes: Spikes | None = None
    temperature: float = 0.7

    def describe(self) -> str:
        """For people."""
        low, high = self.prompt_tokens
        tokens = f"prompts of {low:,} to {high:,} tokens" if low < high else f"prompts of {low:,} tokens"
        if self.log is not None:
            return f"{self.title}: {len(self.log):,} recorded requests"
        if self.documents is not None:
            return f"{self.title}: {self.documents:,} at once, {tokens}"
        if self.users is not None:
            return f"{self.title}: {self.users:,} users, {tokens}, {self.duration_seconds:g} s"
        return f"{self.title}: {self.requests_per_s:g} requests/s, {tokens}, {self.duration_seconds:g} s"

    @property
    def longest(self) -> int:
        """Most tokens of a request and its answer."""
        if self.log is not None:
            return max(prompt + output for _, prompt, output in self.log)
        return self.prompt_tokens[1] + self.output_tokens.most


class Traffic(Protocol):
    """Requests as they come; some only after others were answered."""

    def initial(self) -> list[Arrival]:
        """Those that come whatever happens."""
        ...

    def after(self, arrival: Arrival, now: float) -> Arrival | None:
        """What an answer leads to."""
        ...


class GeneratedTraffic:
    """The requests of a workload and a seed. Each user has random numbers of its own, so what one sends hangs on nobody else."""

    def __init__(self, workload: Workload, seed: int) -> None:
        self._workload = workload
        self._seed = seed
        self._prefix = tuple(range(FIRST_WORD, FIRST_WORD + workload.shared_prefix_tokens))
        self._random: dict[int, np.random.Generator] = {}

    def initial(self) -> list[Arrival]:
        """See `Traffic`."""
        workload = self._workload
        if workload.log is not None:
            return [
                Arrival(time, self._prompt(idx, prompt), output, idx)
                for idx, (time, prompt, output) in enumerate(workload.log)
            ]
        if workload.documents is not None:
            return [self._arrival(idx, 0.0) for idx in range(workload.documents)]
        if workload.users is not None:
            first = (self._arrival(user, self._thought(user, 0.0)) for user in range(workload.users))
            return [arrival for arrival in first if arrival.time < workload.duration_seconds]
        rate = workload.requests_per_s
        assert rate is not None, workload
        found, moment, idx = [], 0.0, 0
        clock = self._of(-1)
        while (moment := moment + clock.exponential(1.0 / rate)) < workload.duration_seconds:
            found.append(self._arrival(idx, moment))
            idx += 1
        return found

    def after(self, arrival: Arrival, now: float) -> Arrival | None:
        """See `Traffic`."""
        if self._workload.users is None:
            return None
        moment = self._thought(arrival.user, now)
        return self._arrival(arrival.user, moment) if moment < self._workload.duration_seconds else None

    def _of(self, user: int) -> np.random.Generator:
        if user not in self._random:
            self._random[user] = np.random.default_rng([self._seed, user + 1])
        return self._random[user]

    def _thought(self, user: int, now: float) -> float:
        """When a user who begins to think at `now` writes: exponential, by thinning where there are spikes (Lewis and Shedler 1979)."""
        random, spikes, moment = self._of(user), self._workload.spikes, now
        most = 1.0 if spikes is None else max(spikes.factor, 1.0)
        while True:
            moment += float(random.exponential(self._workload.think_seconds / most))
            if spikes is None or random.random() * most < spikes.factor_at(moment):
                return moment

    def _arrival(self, user: int, moment: float) -> Arrival:
        random, workload = self._of(user), self._workload
        low, high = workload.prompt_tokens
        length = int(random.integers(low, high + 1))
        return Arrival(moment, self._prompt(user, length), workload.output_tokens.draw(random), user)

    def _prompt(self, user: int, length: int) -> tuple[int, ...]:
        own = self._of(user).integers(FIRST_WORD, 30_000, max(length - len(self._prefix), 1)).tolist()
        return (*self._prefix[: length - len(own)], *own)


def built_in() -> dict[str, Workload]:
    """The workloads of workloads.json."""
    path = Path(__file__).parent / "workloads.json"
    return {name: parse(name, entry) for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}


def load_workload(name: str) -> Workload:
    """A built-in one by its name, or that of a file: JSON like an entry of workloads.json, or JSON lines of recorded requests.

    Raises InvalidConfigError.
    """
    known = built_in()
    if name in known:
        return known[name]
    path = Path(name)
    if not path.is_file():
        raise InvalidConfigError(f"workload {name!r} is neither one of {', '.join(known)} nor a file")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return _recorded(path.stem, [json.loads(line) for line in text.splitlines() if line.strip()])
        return parse(path.stem, json.loads(text))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidConfigError(f"{path} does not describe a workload: {error!r}") from error


def measured_acceptance(path: Path, method: str) -> tuple[float, ...]:
    """What `quire bench speculate --json` measured of a method: of the drafts tested at each position, the share that was accepted.

    Of the largest fixed number of drafts in the file, all its records together. Raises InvalidConfigError where there is none.
    """
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
        mine = [one for one in records if one.get("method") == method and one.get("num_drafts") and one.get("rounds")]
        most = max((one["num_drafts"] for one in mine), default=0)
        mine = [one for one in mine if one["num_drafts"] == most]
        rounds = sum(one["rounds"] for one in mine)
        reached = [
            sum(one["rounds"] * one["accepted_per_pos"][idx] for one in mine) / rounds if rounds else 0.0
            for idx in range(most)
        ]
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise InvalidConfigError(f"{path} does not hold JSON lines of quire bench speculate: {error!r}") from error
    if not reached:
        raise InvalidConfigError(f"{path} has no record of {method} with a fixed number of drafts")
    before = [1.0, *reached[:-1]]
    return tuple(share / tested if tested else 0.0 for share, tested in zip(reached, before, strict=True))


def parse(name: str, entry: Mapping[str, Any]) -> Workload:
    """Raises InvalidConfigError, KeyError or TypeError for what is none."""
    known = {field.name for field in fields(Workload)} - {"name", "log"}
    if unknown := sorted(set(entry) - known):
        raise InvalidConfigError(
            f"workload {name}: unknown {', '.join(unknown)}; there are: {', '.join(sorted(known))}"
        )
    values = dict(entry)
    values.setdefault("title", name)
    values["prompt_tokens"] = tuple(values["prompt_tokens"])
    values["output_tokens"] = Lengths(**values["output_tokens"])
    values["promise"] = Promise(**values["promise"])
    if values.get("spikes") is not None:
        values["spikes"] = Spikes(**values["spikes"])
    workload = Workload(name=name, **values)
    kinds = [kind for kind in ("users", "documents", "requests_per_s") if values.get(kind) is not None]
    if len(kinds) != 1:
        raise InvalidConfigError(
            f"workload {name}: give one of users, documents and requests_per_s, not {kinds or 'none'}"
        )
    if workload.promise.metric not in METRICS:
        raise InvalidConfigError(
            f"workload {name}: promise metric {workload.promise.metric!r} is not one of {', '.join(METRICS)}"
        )
    if workload.promise.percentile not in PERCENTILES:
        raise InvalidConfigError(
            f"workload {name}: promise percentile {workload.promise.percentile} is not one of {', '.join(map(str, PERCENTILES))}"
        )
    if not 0 < workload.prompt_tokens[0] <= workload.prompt_tokens[1]:
        raise InvalidConfigError(f"workload {name}: prompt_tokens are fewest and most, not {entry['prompt_tokens']}")
    lengths, spikes = workload.output_tokens, workload.spikes
    above_zero: dict[str, float | None] = {
        **{kind: values[kind] for kind in kinds},
        "duration_seconds": workload.duration_seconds,
        "output_tokens median": lengths.median,
        "spikes every": spikes.every if spikes else None,
        "spikes factor": spikes.factor if spikes else None,
    }
    for what, value in above_zero.items():
        if value is not None and not value > 0:
            raise InvalidConfigError(f"workload {name}: {what} must be above 0, not {value}")
    if not 1 <= lengths.least <= lengths.most:
        raise InvalidConfigError(
            f"workload {name}: output_tokens are at least 1, and least is no more than most, not {entry['output_tokens']}"
        )
    if workload.users is not None and workload.think_seconds <= 0:
        raise InvalidConfigError(
            f"workload {name}: think_seconds of users must be above 0, not {workload.think_seconds}"
        )
    return workload


def _recorded(name: str, lines: list[dict[str, Any]]) -> Workload:
    """JSON lines with arrival_time or timestamp in seconds, prompt_tokens and completion_tokens."""
    rows = sorted(
        (
            float(line["arrival_time"] if "arrival_time" in line else line["timestamp"]),
            int(line["prompt_tokens"]),
            int(line["completion_tokens"]),
        )
        for line in lines
    )
    if not rows:
        raise InvalidConfigError(f"{name} records no request")
    begin = rows[0][0]
    log = tuple((time - begin, max(prompt, 1), max(output, 1)) for time, prompt, output in rows)
    prompts, outputs = [prompt for _, prompt, _ in log], [output for _, _, output in log]
    promise = Promise("first_token", 95, 2.0)
    lengths = Lengths(most=max(outputs))
    return Workload(name, name, (min(prompts), max(prompts)), lengths, promise, log=log, duration_seconds=log[-1][0])
