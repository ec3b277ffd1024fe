"""What is measured: the cases, their requests, and how a figure is taken from the times at which tokens came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quire.kernels.errors import InvalidConfigError

DEFAULT_CASES = (
    "decode-1",
    "decode-8",
    "decode-32",
    "prefill-512",
    "prefill-2048",
    "mixed-64",
    "ready-warm",
    "ready-cold",
    "memory",
)
DECODE_LEN = 128  # tokens of each prompt and of each output
MIXED_INPUT_LEN, MIXED_OUTPUT_LEN = (16, 512), (16, 256)
FIRST_TOKEN_ID = 3  # those before it are the special ones
WARM_UP_OUTPUT_LEN = 8
MAX_WARM_UP_REQUESTS = 32
MAX_BLOCK_SIZE = 128  # of any engine's cache, in tokens


@dataclass(frozen=True)
class Requests:
    """Prompts as token ids, and how many tokens each output has."""

    prompts: tuple[tuple[int, ...], ...]
    output_lens: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One thing measured. `number` is the concurrency of decode, the prompt's length of prefill, the requests of mixed."""

    name: str
    kind: str
    number: int = 0

    @classmethod
    def parse(cls, name: str) -> Case:
        """Raises InvalidConfigError for what is none."""
        kind, _, number = name.partition("-")
        if name in ("ready-warm", "ready-cold", "memory"):
            return cls(name, name)
        if kind in ("decode", "prefill", "mixed") and number.isascii() and number.isdecimal() and int(number) > 0:
            return cls(name, kind, int(number))
        raise InvalidConfigError(
            f"case {name!r} is none of decode-N (at concurrency N), prefill-N (N tokens), mixed-N (N requests), "
            "ready-warm, ready-cold, memory"
        )

    @property
    def has_requests(self) -> bool:
        """Whether it is measured by running requests; the others are read off a process's life."""
        return self.kind in ("decode", "prefill", "mixed")

    @property
    def unit(self) -> str:
        """Of its figure."""
        if self.has_requests:
            return "tokens/s"
        return "GiB" if self.kind == "memory" else "s"

    @property
    def higher_is_better(self) -> bool:
        """Whether more is better."""
        return self.has_requests

    @property
    def title(self) -> str:
        """For people."""
        titles = {
            "decode": f"decode, {self.number} at once",
            "prefill": f"prefill, {self.number} tokens",
            "mixed": f"{self.number} mixed requests",
            "ready-warm": "start to ready, warm",
            "ready-cold": "start to ready, cold",
            "memory": "peak memory",
        }
        return titles[self.kind]

    def requests(self, vocab_size: int, shortened: int = 1, seed: int = 0) -> Requests:
        """The same for the same arguments: random tokens, no two prompts alike. `shortened` divides every length."""
        rng = np.random.default_rng([seed, self.number, len(self.kind)])
        if self.kind == "mixed":
            lens = [[max(bound // shortened, 2) for bound in pair] for pair in (MIXED_INPUT_LEN, MIXED_OUTPUT_LEN)]
            input_lens, output_lens = (rng.integers(low, high + 1, self.number).tolist() for low, high in lens)
        elif self.kind == "prefill":
            input_lens, output_lens = [max(self.number // shortened, 2)], [1]
        else:
            input_lens = output_lens = [max(DECODE_LEN // shortened, 2)] * self.number
        prompts = tuple(tuple(rng.integers(FIRST_TOKEN_ID, vocab_size, size).tolist()) for size in input_lens)
        return Requests(prompts, tuple(output_lens))

    def warm_up(self, vocab_size: int, shortened: int = 1, seed: int = 0) -> Requests:
        """Other requests of the same lengths, few and with short outputs, so that whatever is made at first use is made."""
        requests = self.requests(vocab_size, shortened, seed + 1)
        output_lens = tuple(min(output_len, WARM_UP_OUTPUT_LEN) for output_len in requests.output_lens)
        return Requests(requests.prompts[:MAX_WARM_UP_REQUESTS], output_lens[:MAX_WARM_UP_REQUESTS])

    def figure(self, requests: Requests, token_times: Sequence[Sequence[float]]) -> float:
        """Tokens per second from the time of each request's tokens. Raises ValueError where there is none to take."""
        check_lengths(requests, token_times)
        if self.kind == "decode":
            return decode_rate(token_times)
        num_tokens = len(requests.prompts[0]) if self.kind == "prefill" else sum(requests.output_lens)
        return num_tokens / max(times[-1] for times in token_times)


def check_lengths(requests: Requests, tokens: Sequence[Sequence[object]]) -> None:
    """Raises ValueError where an output has not the length that was asked for."""
    lens = [len(output) for output in tokens]
    if lens != list(requests.output_lens):
        wrong = next((got, wanted) for got, wanted in zip(lens, requests.output_lens, strict=True) if got != wanted)
        raise ValueError(f"an output of {wrong[0]} tokens where {wrong[1]} were asked for")


def decode_rate(token_times: Sequence[Sequence[float]]) -> float:
    """Tokens per second while every request decodes.

    The clock runs from the first token of the request that is last to get one, to the last token of the request that is
    first to end: neither prompts nor a batch that thins out are in it.
    """
    begin = max(times[0] for times in token_times)
    end = min(times[-1] for times in token_times)
    if end <= begin:
        raise ValueError("at no moment were all requests decoding: one ended before another had its first token")
    return sum(begin < seconds <= end for times in token_times for seconds in times) / (end - begin)


def max_model_len(cases: Sequence[Case], shortened: int = 1) -> int:
    """Tokens of the longest request of any case, with a little room; a multiple of 256."""
    longest = [sum(MIXED_INPUT_LEN[1:] + MIXED_OUTPUT_LEN[1:]), 2 * DECODE_LEN]
    longest += [case.number + WARM_UP_OUTPUT_LEN for case in cases if case.kind == "prefill"]
    return -(-(max(longest) // shortened + 16) // 256) * 256


def max_num_seqs(cases: Sequence[Case]) -> int:
    """How many requests an engine runs at once: as many as the widest decode case, 32 without one."""
    return max([case.number for case in cases if case.kind == "decode"], default=32)


def num_kv_tokens(cases: Sequence[Case], shortened: int = 1) -> int:
    """Room in the KV cache, in tokens: for as many of the longest mixed requests as run at once, or for the longest prompt.

    Each may leave most of a block unused, and one block may not be usable at all.
    """
    mixed = sum(MIXED_INPUT_LEN[1:] + MIXED_OUTPUT_LEN[1:]) // shortened
    return (
        -(-max((max_num_seqs(cases) + 1) * (mixed + MAX_BLOCK_SIZE), 2 * max_model_len(cases, shortened)) // 256) * 256
    )
