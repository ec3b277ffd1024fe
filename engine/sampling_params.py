"""What a caller may ask of one request's sampling, spelled as vLLM spells it; checked in full when it is made.

Owns the meaning, the range and the normal form of every parameter. Knows nothing of a model: what needs a vocabulary
is checked by `SamplingParams.verify_against`, what needs a tokenizer by `bad_words_token_ids`. Does not import jax.
"""

import math
import numbers
import operator
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Generic, Protocol, TypeVar, overload

from quire.kernels.errors import InvalidRequestError

# The compiled step holds these per row in arrays of a fixed width (a width that grew would be a recompilation), so
# that each is a trade of what callers use against memory and time that every row pays.
MAX_LOGIT_BIAS = 300  # OpenAI's own limit
MAX_STOP_TOKEN_IDS = 64  # the longest end-of-turn lists in generation_config.json files hold a handful
MAX_BAD_WORDS = 32  # token sequences; one word is up to two of them, with and without the space before it
MAX_BAD_WORD_TOKENS = 8  # tokens in one sequence: the step compares this many of the last tokens
MAX_LOGPROBS = 20  # OpenAI's own limit; keeps the only top_k of the step a small one

MAX_CHOICES = 16384  # vLLM's default; each choice is a request of its own
MAX_INT32 = 2**31 - 1  # counts travel to the device as int32
SEED_BITS = 64  # seeds are taken modulo 2**64, so that signed and unsigned 64-bit seeds are all different and all work
GREEDY_EPS = 1e-5  # a temperature below this is greedy, as in vLLM: logits / temperature would leave float32's range
MAX_TEMPERATURE = 100.0  # far past uniform; above it, it is a mistake
REPETITION_PENALTY_RANGE = (1e-4, 1e4)  # a float32 logit multiplied or divided by it stays finite
LOGIT_BIAS_RANGE = (-100.0, 100.0)  # OpenAI's: -100 is as good as a ban, 100 as good as a must

_Given = TypeVar("_Given")
_Kept = TypeVar("_Kept")


class RequestOutputKind(Enum):
    """What each `RequestOutput` of a request in progress carries."""

    CUMULATIVE = 0  # everything so far, in every output
    DELTA = 1  # only what is new since the last output, and only the choices that have something new
    FINAL_ONLY = 2  # nothing until the request has finished


class _Converted(Generic[_Given, _Kept]):
    """A dataclass field that is given as one type and kept as another, which type checkers then both know.

    `SamplingParams.__post_init__` does the conversion itself; this only carries the two types and the default.
    """

    def __init__(self, default: _Kept) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Any: ...
    @overload
    def __get__(self, instance: object, owner: type) -> _Kept: ...
    def __get__(self, instance: object | None, owner: type) -> Any:
        return self.default if instance is None else instance.__dict__[self.name]

    def __set__(self, instance: object, value: _Given) -> None:
        instance.__dict__[self.name] = value


_GivenIds = Sequence[int] | None


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one request, when to stop, and what to report.

    The defaults sample from the model's own distribution. Every field is checked on construction; what is out of
    range raises `InvalidRequestError`, whose `parameter` is the name of the field. Kept in a normal form: lists become
    tuples without duplicates, `top_k=-1` becomes 0, a seed is taken modulo 2**64 (-1 is no seed, as in vLLM), and a
    greedy request has temperature 0 and no top_k, top_p or min_p, which cannot change the most likely token.

    Fields:
      n: how many outputs to sample for the prompt; above 1 it needs a temperature.
      presence_penalty, frequency_penalty: in [-2, 2]; subtracted from the logit of a token that is in the output,
        once, or once per occurrence.
      repetition_penalty: in [1e-4, 1e4]; the logit of a token that is in the prompt or the output is divided by it
        if positive, else multiplied (Keskar et al. 2019, section 4.1). 1 is off.
      temperature: in [0, 100]; below 1e-5 the most likely token is taken.
      top_k: at least 1, or 0 (also -1) for off. top_p: in (0, 1], 1 for off. min_p: in [0, 1], relative to the most
        likely token, 0 for off.
      seed: any 64-bit integer, signed or not. The same seed and prompt give the same output in any batch.
      stop: strings that end the output and are left out of it, unless `include_stop_str_in_output`.
      stop_token_ids: token ids that end the output; at most 64.
      ignore_eos: go on after the model's own end-of-sequence token.
      max_tokens: the most output tokens; None is whatever fits. min_tokens: how many come before any stop.
      bad_words: words whose token sequence is never completed; at most 32 sequences of at most 8 tokens.
      logit_bias: token id to a number in [-100, 100] added to its logit; at most 300 of them.
      allowed_token_ids: where given, no other token is ever sampled.
      logprobs, prompt_logprobs: how many of the most likely tokens to report for each output or prompt token, beside
        the token itself; 0 reports that alone, None nothing; at most 20.
      detokenize: whether to make text. skip_special_tokens: whether to leave special tokens out of it.
      spaces_between_special_tokens: whether special tokens that are shown have spaces between them (slow tokenizers
        only, as in transformers).
      output_kind: what each output of a request in progress carries.
      num_speculative_tokens: the most tokens drafted at once for this request, at most as many as the engine drafts; 0 is none, None
        leaves it to the engine. Has no influence on what is generated.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: _Converted[str | Sequence[str] | None, tuple[str, ...]] = _Converted(())
    stop_token_ids: _Converted[_GivenIds, tuple[int, ...]] = _Converted(())
    bad_words: _Converted[Sequence[str] | None, tuple[str, ...]] = _Converted(())
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: _Converted[Mapping[int, float] | None, dict[int, float] | None] = _Converted(None)
    allowed_token_ids: _Converted[_GivenIds, tuple[int, ...] | None] = _Converted(None)
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    num_speculative_tokens: int | None = None

    def __post_init__(self) -> None:
        self._keep_numbers()
        self._keep_lists()
        for name in _FLAGS:
            _require(isinstance(getattr(self, name), bool), name, "must be True or False", getattr(self, name))
        is_kind = isinstance(self.output_kind, RequestOutputKind)
        _require(is_kind, "output_kind", "must be a RequestOutputKind", self.output_kind)
        if self.temperature < GREEDY_EPS:
            self._keep(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
        self._check_combinations()

    def __hash__(self) -> int:
        return hash((self.n, self.temperature, self.seed, self.max_tokens, self.stop, self.stop_token_ids))

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the most likely one, so that no noise is needed."""
        return self.temperature == 0.0

    def clone_for_choice(self, index: int) -> "SamplingParams":
        """The parameters of choice `index` of the `n`: a request for one output, with a seed of its own.

        The seed is `(seed + index) % 2**64`, vLLM's rule, so that choice i of seed s is the only choice of seed s + i.
        Without a seed the clones have none. Choice 0 alone computes the prompt's log-probabilities: they are the same for all.
        """
        assert 0 <= index < self.n, f"choice {index} of {self.n}"
        seed = None if self.seed is None else (self.seed + index) % 2**SEED_BITS
        return replace(self, n=1, seed=seed, prompt_logprobs=self.prompt_logprobs if index == 0 else None)

    def verify_against(self, vocab_size: int, eos_token_ids: Sequence[int] = ()) -> None:
        """Raise `InvalidRequestError` for a token id outside the vocabulary, or where no token is left to sample."""
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token_id in getattr(self, name) or ():
                _require_in_vocab(token_id, vocab_size, name)
        self._check_something_is_left(() if self.ignore_eos else eos_token_ids)

    def _keep(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _keep_numbers(self) -> None:
        for name, low, high in _INTEGERS:
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                self._keep(**{name: _integer(value, name, low, high)})
        for name, low, high in _FLOATS:
            self._keep(**{name: _number(getattr(self, name), name, low, high)})
        _require(self.top_p > 0.0, "top_p", "must be in (0, 1] (1 keeps every token)", self.top_p)
        if self.top_k == -1:
            self._keep(top_k=0)
        if self.seed is not None:
            self._keep(seed=None if self.seed == -1 else self.seed % 2**SEED_BITS)

    def _keep_lists(self) -> None:
        stop: Any = self.stop
        self._keep(
            stop=_strings([stop] if isinstance(stop, str) else stop, "stop"),
            bad_words=_strings(self.bad_words, "bad_words", MAX_BAD_WORDS),
            stop_token_ids=_token_ids(self.stop_token_ids, "stop_token_ids", MAX_STOP_TOKEN_IDS),
            logit_bias=_biases(self.logit_bias),
        )
        if self.allowed_token_ids is not None:
            allowed = _token_ids(self.allowed_token_ids, "allowed_token_ids")
            _require(len(allowed) > 0, "allowed_token_ids", "must hold a token id, or be None to allow all", [])
            self._keep(allowed_token_ids=allowed)

    def _check_combinations(self) -> None:
        if self.is_greedy and self.n > 1:
            raise InvalidRequestError(
                f"n must be 1 for greedy sampling (temperature 0), got {self.n}: the outputs would all be the same. "
                "Ask for one, or set a temperature.",
                parameter="n",
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens must not exceed max_tokens, got {self.min_tokens} and {self.max_tokens}.",
                parameter="min_tokens",
            )
        if self.stop and not self.detokenize:
            raise InvalidRequestError(
                f"stop strings are looked for in the text, got stop={list(self.stop)} with detokenize=False. "
                "Set detokenize=True, or use stop_token_ids.",
                parameter="stop",
            )
        self._check_something_is_left(())

    def _check_something_is_left(self, eos_token_ids: Sequence[int]) -> None:
        """Before `min_tokens` every stopping token is banned: where only those are allowed, nothing can be sampled."""
        if self.min_tokens == 0 or self.allowed_token_ids is None:
            return
        if set(self.allowed_token_ids) <= {*self.stop_token_ids, *eos_token_ids}:
            raise InvalidRequestError(
                f"min_tokens={self.min_tokens} bans the tokens that stop, and allowed_token_ids "
                f"{list(self.allowed_token_ids)} has no other. Set min_tokens=0, or allow another token.",
                parameter="allowed_token_ids",
            )


_FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)
_OPTIONAL = ("max_tokens", "seed", "logprobs", "prompt_logprobs", "num_speculative_tokens")
_INTEGERS = (  # name, lowest, highest
    ("n", 1, MAX_CHOICES),
    ("top_k", -1, MAX_INT32),
    ("seed", -(2 ** (SEED_BITS - 1)), 2**SEED_BITS - 1),
    ("max_tokens", 1, MAX_INT32),
    ("min_tokens", 0, MAX_INT32),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
    ("num_speculative_tokens", 0, MAX_INT32),
)
_FLOATS = (
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", *REPETITION_PENALTY_RANGE),
    ("temperature", 0.0, MAX_TEMPERATURE),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
)


class Encoder(Protocol):
    """What `bad_words_token_ids` needs of a tokenizer; `quire.engine.tokenizer.Tokenizer` is one."""

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...


def bad_words_token_ids(params: SamplingParams, tokenizer: Encoder) -> tuple[tuple[int, ...], ...]:
    """The token sequences that `params.bad_words` forbids: each word as it begins a text and as it follows a space.

    vLLM's rule: the form with a space counts only where it is as long as the other and begins with a different
    token, that is, where the space is part of the word's first token; elsewhere completing the word completes the
    plain form too. Raises `InvalidRequestError` for a word of no tokens or of more than `MAX_BAD_WORD_TOKENS`, and
    for more than `MAX_BAD_WORDS` sequences in all.
    """
    sequences: dict[tuple[int, ...], None] = {}  # as an ordered set
    for word in params.bad_words:
        plain = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        if not 1 <= len(plain) <= MAX_BAD_WORD_TOKENS:
            raise InvalidRequestError(
                f"each of bad_words must be 1 to {MAX_BAD_WORD_TOKENS} tokens long, but {word!r} is {len(plain)}. "
                "Give a shorter word, or its rarest part.",
                parameter="bad_words",
            )
        sequences[plain] = None
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            sequences[spaced] = None
    if len(sequences) > MAX_BAD_WORDS:
        raise InvalidRequestError(
            f"bad_words may make at most {MAX_BAD_WORDS} token sequences, got {len(sequences)} from "
            f"{len(params.bad_words)} words (with and without the space before a word). Give fewer words.",
            parameter="bad_words",
        )
    return tuple(sequences)


def _require(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise InvalidRequestError(f"{name} {rule}, got {value!r}.", parameter=name)


def _integer(value: Any, name: str, low: int, high: int) -> int:
    """`value` as an int; NumPy's integers are taken, booleans and floats are not."""
    _require(_is_integer(value), name, f"must be an integer from {low} to {high}", value)
    number = operator.index(value)
    _require(low <= number <= high, name, f"must be from {low} to {high}", number)
    return number


def _number(value: Any, name: str, low: float, high: float) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    _require(is_number and math.isfinite(value), name, f"must be a number from {low:g} to {high:g}", value)
    number = float(value)
    _require(low <= number <= high, name, f"must be from {low:g} to {high:g}", number)
    return number


def is_unicode(text: str) -> bool:
    """Whether `text` has no lone surrogates, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _items(values: Any, name: str, kind: str) -> list[Any]:
    if values is None:
        return []
    is_list = not isinstance(values, str | bytes | Mapping) and hasattr(values, "__iter__")
    _require(is_list, name, f"must be a list of {kind}", values)
    return list(values)


def _at_most(limit: int | None, values: Sized, name: str, kind: str) -> None:
    if limit is not None and len(values) > limit:
        raise InvalidRequestError(f"{name} may hold at most {limit} {kind}, got {len(values)}.", parameter=name)


def _strings(values: Any, name: str, limit: int | None = None) -> tuple[str, ...]:
    strings = _items(values, name, "strings")
    for string in strings:
        _require(isinstance(string, str), name, "must hold only strings", string)
        _require(len(string) > 0, name, "must not hold an empty string", strings)
        _require(is_unicode(string), name, "must hold only Unicode text (no lone surrogates)", string)
    distinct = tuple(dict.fromkeys(strings))
    _at_most(limit, distinct, name, "strings")
    return distinct


def _token_ids(values: Any, name: str, limit: int | None = None) -> tuple[int, ...]:
    token_ids = _items(values, name, "token ids")
    distinct = tuple(dict.fromkeys(_integer(token_id, name, 0, MAX_INT32) for token_id in token_ids))
    _at_most(limit, distinct, name, "token ids")
    return distinct


def _biases(values: Any) -> dict[int, float] | None:
    if values is None:
        return None
    name = "logit_bias"
    _require(isinstance(values, Mapping), name, "must map token ids to numbers", values)
    _at_most(MAX_LOGIT_BIAS, values, name, "token ids")
    return {_integer(key, name, 0, MAX_INT32): _number(value, name, *LOGIT_BIAS_RANGE) for key, value in values.items()}


def _require_in_vocab(token_id: int, vocab_size: int, name: str) -> None:
    if not 0 <= token_id < vocab_size:
        raise InvalidRequestError(
            f"{name} holds token id {token_id}, but the vocabulary has {vocab_size} tokens (0 to {vocab_size - 1}).",
            parameter=name,
        )
