"""From what a caller writes to what the engine core takes: text to token ids, `n` to one request per choice, every check."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from quire.engine.device_state import NUM_STOP_IDS, sampling_mode
from quire.engine.request import EngineCoreRequest
from quire.engine.sampling_params import (
    MAX_BAD_WORDS,
    MAX_INT32,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
    bad_words_token_ids,
    is_unicode,
)
from quire.engine.tokenizer import Tokenizer
from quire.kernels.errors import InvalidConfigError, InvalidRequestError
from quire.kernels.sampling.rows import SamplingMode

Prompt: TypeAlias = str | Mapping[str, object] | Sequence[int]
"""A string, {"prompt": str}, {"prompt_token_ids": [...]}, or a list of token ids."""


@dataclass(frozen=True)
class ProcessedRequest:
    """A caller's request, checked, and the engine's requests for its choices."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival_time: float
    choices: tuple[EngineCoreRequest, ...]


class InputProcessor:
    """Owns the tokenizer's way in and the seeds of requests that bring none. Knows nothing of the scheduler."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        seed: int,
        most_sampling: SamplingMode = SamplingMode.FULL,
    ) -> None:
        """`tokenizer` may be None where every prompt comes as token ids and no text is wanted.

        `most_sampling` is the largest sampling program that was compiled; requests that need a larger one are refused.
        """
        if len(eos_token_ids) > NUM_STOP_IDS - MAX_STOP_TOKEN_IDS:
            most = NUM_STOP_IDS - MAX_STOP_TOKEN_IDS
            raise InvalidConfigError(
                f"the model has {len(eos_token_ids)} end-of-sequence tokens; at most {most} are supported"
            )
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._most_sampling = most_sampling
        self._seeds = np.random.default_rng(seed)

    def process(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> ProcessedRequest:
        """Checks everything about one request. Raises InvalidRequestError naming the parameter; nothing is queued yet."""
        text, token_ids = self._tokenize(prompt)
        self._check_prompt(token_ids)
        token_ids = tuple(map(int, token_ids))  # NumPy's integers are taken, and kept as Python's own
        params.verify_against(self._vocab_size, self._eos_token_ids)
        _check_priority(priority)
        _check_cache_salt(cache_salt)
        needed = SamplingMode.FULL if params.prompt_logprobs is not None else sampling_mode(params)
        if needed > self._most_sampling:
            raise InvalidRequestError(
                f"the request needs {needed.name.lower()} sampling, and the engine was started with sampling="
                f"{self._most_sampling.name.lower()}; start it with more, or ask for less",
                parameter="sampling_params",
            )
        if params.detokenize and self._tokenizer is None:
            raise InvalidRequestError(
                "there is no tokenizer to make text with; set detokenize=False", parameter="detokenize"
            )
        bad_words = self._bad_words(params)
        if params.seed is None:
            params = replace(params, seed=int(self._seeds.integers(0, 2**63)))
        arrival_time = time.monotonic()
        choices = tuple(
            EngineCoreRequest(
                request_id=request_id if params.n == 1 else f"{request_id}#{idx}",
                prompt_token_ids=token_ids,
                params=params.clone_for_choice(idx),
                arrival_time=arrival_time,
                eos_token_ids=self._eos_token_ids,
                bad_words=bad_words,
                priority=priority,
                cache_salt=cache_salt,
            )
            for idx in range(params.n)
        )
        return ProcessedRequest(request_id, text, token_ids, params, arrival_time, choices)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...]]:
        given: object = prompt
        if isinstance(prompt, Mapping):
            keys = {"prompt", "prompt_token_ids"} & set(prompt)
            if len(keys) != 1 or len(prompt) != 1:
                raise InvalidRequestError(
                    f"a prompt given as a dict has exactly one key, 'prompt' or 'prompt_token_ids', not {sorted(prompt)}",
                    parameter="prompt",
                )
            given = next(iter(prompt.values()))
            if ("prompt" in keys) != isinstance(given, str):
                key = keys.pop()
                wanted = "a string" if key == "prompt" else "a list of token ids"
                raise InvalidRequestError(f"{key!r} holds {wanted}, not {type(given).__name__}", parameter="prompt")
        if isinstance(given, str):
            if self._tokenizer is None:
                raise InvalidRequestError("there is no tokenizer; give prompt_token_ids", parameter="prompt")
            return given, tuple(self._tokenizer.encode(given))
        if not isinstance(given, Sequence) or isinstance(given, (bytes, bytearray)):
            raise InvalidRequestError(
                f"a prompt is a string or a list of token ids, not {type(given).__name__}", parameter="prompt"
            )
        return None, tuple(given)

    def _check_prompt(self, token_ids: tuple[int, ...]) -> None:
        if not token_ids:
            raise InvalidRequestError("the prompt is empty; give at least one token", parameter="prompt")
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, (int, np.integer)):
                raise InvalidRequestError(f"token ids are whole numbers, not {token_id!r}", parameter="prompt")
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is outside the vocabulary, 0 to {self._vocab_size - 1}", parameter="prompt"
                )
        if len(token_ids) >= self._max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(token_ids)} tokens, and max_model_len is {self._max_model_len}, which leaves no room "
                "for a token to be generated; shorten the prompt or raise max_model_len",
                parameter="prompt",
            )

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words:
            return ()
        if self._tokenizer is None:
            raise InvalidRequestError("bad_words needs a tokenizer, and there is none", parameter="bad_words")
        sequences = bad_words_token_ids(params, self._tokenizer)
        assert len(sequences) <= MAX_BAD_WORDS
        banned = {sequence[0] for sequence in sequences if len(sequence) == 1}
        if params.allowed_token_ids is not None and banned.issuperset(params.allowed_token_ids):
            raise InvalidRequestError(
                f"bad_words {list(params.bad_words)} bans every token of allowed_token_ids "
                f"{list(params.allowed_token_ids)}; allow another token, or give fewer words",
                parameter="bad_words",
            )
        return sequences


def _check_priority(priority: object) -> None:
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_INT32:
        raise InvalidRequestError(
            f"priority is a whole number from -{MAX_INT32} to {MAX_INT32}, not {priority!r}", parameter="priority"
        )


def _check_cache_salt(cache_salt: object) -> None:
    if cache_salt is not None and not (isinstance(cache_salt, str) and is_unicode(cache_salt)):
        raise InvalidRequestError(
            f"cache_salt is a string of Unicode text (no lone surrogates), or None, not {cache_salt!r}",
            parameter="cache_salt",
        )
