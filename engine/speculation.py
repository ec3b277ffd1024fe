"""What a user can say of speculative decoding, and whether two models can speculate together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from quire.engine.tokenizer import has_tokenizer, load_tokenizer
from quire.kernels.errors import InvalidConfigError
from quire.models.checkpoint import resolve_model
from quire.models.config import ModelConfig

Method = Literal["draft_model", "ngram", "eagle3"]
METHODS: tuple[str, ...] = get_args(Method)
MAX_SPECULATIVE_TOKENS = 16
MAX_LOOKUP = 8


@dataclass(frozen=True)
class SpeculativeConfig:
    """How drafts are made. Spelled as vLLM spells it.

    Fields:
      method: draft_model drafts with a smaller model of the same vocabulary; ngram copies what followed when the last tokens stood in
        the text before; eagle3 drafts with a head that was trained for the target. Left out, it is draft_model where there is a `model`.
      model: Hugging Face id or folder of the draft model, or of the head.
      num_speculative_tokens: the most tokens drafted per round.
      prompt_lookup_max, prompt_lookup_min: for ngram, how many of the last tokens are looked for, at most and at least.
      adaptive: whether the engine drafts fewer tokens, down to none, where that has turned out to be faster.
      quantization: of the draft model's or the head's weights; none or int8, the target's own when left out.
    """

    method: Method
    model: str | None = None
    num_speculative_tokens: int = 5
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    adaptive: bool = True
    quantization: Literal["none", "int8"] | None = None

    @classmethod
    def parse(cls, given: object) -> SpeculativeConfig:
        """From a mapping, or its JSON. Raises InvalidConfigError naming the key, the value and what is allowed."""
        if isinstance(given, SpeculativeConfig):
            return given
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError as error:
                raise InvalidConfigError(f"speculative_config is a JSON object, and this is none: {error}") from error
        if not isinstance(given, Mapping):
            raise InvalidConfigError(f"speculative_config holds settings by name, not {given!r}")
        values: dict[str, Any] = dict(given)
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(map(str, values)) - set(known)):
            raise InvalidConfigError(f"speculative_config has no {', '.join(unknown)}; there are: {', '.join(known)}")
        if "method" not in values and values.get("model") is not None:
            values["method"] = "draft_model"
        if values.get("method") not in METHODS:
            raise InvalidConfigError(
                f"speculative_config method={values.get('method')!r} is not one of {', '.join(METHODS)}"
            )
        config = cls(**values)
        config._check()
        return config

    def _check(self) -> None:
        def whole(name: str, least: int, most: int) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise InvalidConfigError(
                    f"speculative_config {name} must be a whole number from {least} to {most}, not {value!r}"
                )

        whole("num_speculative_tokens", 1, MAX_SPECULATIVE_TOKENS)
        whole("prompt_lookup_max", 1, MAX_LOOKUP)
        whole("prompt_lookup_min", 1, self.prompt_lookup_max)
        if not isinstance(self.adaptive, bool):
            raise InvalidConfigError(f"speculative_config adaptive must be true or false, not {self.adaptive!r}")
        if self.quantization not in (None, "none", "int8"):
            raise InvalidConfigError(f"speculative_config quantization must be none or int8, not {self.quantization!r}")
        if self.has_model and not isinstance(self.model, str):
            raise InvalidConfigError(f"speculative_config method={self.method!r} needs a model to draft with")
        if not self.has_model and self.model is not None:
            raise InvalidConfigError(
                f"speculative_config method={self.method!r} drafts without a model; leave out model={self.model!r}"
            )

    @property
    def has_model(self) -> bool:
        """Whether drafts come from parameters of their own."""
        return self.method != "ngram"

    def draft_counts(self, most: int) -> tuple[int, ...]:
        """The numbers of drafts that are compiled: the most, and halves of it, at most `most` of them; ascending."""
        counts = [self.num_speculative_tokens]
        while self.adaptive and counts[-1] > 1 and len(counts) < most:
            counts.append(counts[-1] // 2)
        return tuple(reversed(counts))


def check_vocabularies(
    target_folder: Path, target: ModelConfig, draft_folder: Path, draft: ModelConfig, tokenizer: str | None
) -> None:
    """Raises InvalidConfigError with both vocabularies where a draft model's token ids do not mean what the target's mean.

    Where one of the folders has no tokenizer, as random models have none, sizes are all that can be compared. `tokenizer` is a
    folder or a name of one that takes the place of the target's own.
    """
    folders = (resolve_model(tokenizer) if tokenizer else target_folder, draft_folder)
    if not all(map(has_tokenizer, folders)):
        if target.vocab_size != draft.vocab_size:
            raise InvalidConfigError(
                f"the draft model's vocabulary has {draft.vocab_size} tokens and the target's {target.vocab_size}; take a draft model "
                "with the target's tokenizer"
            )
        return
    ours, theirs = (load_tokenizer(folder).vocabulary() for folder in folders)
    if ours == theirs:
        return
    token_id = min(idx for _, idx in set(ours.items()) ^ set(theirs.items()))
    here, there = (_spelling(vocabulary, token_id) for vocabulary in (ours, theirs))
    raise InvalidConfigError(
        f"the draft model's vocabulary of {len(theirs)} tokens is not the target's of {len(ours)}: token {token_id} is {there} there "
        f"and {here} here; take a draft model with the target's tokenizer ({draft_folder} has another than {folders[0]})"
    )


def _spelling(vocabulary: Mapping[str, int], token_id: int) -> str:
    return next((repr(text) for text, idx in vocabulary.items() if idx == token_id), "no token")
