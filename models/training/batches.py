"""Token streams and the rows drawn from them: deterministic, without replacement within an epoch, resumable from a few counters."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from jinja2 import Template
from numpy.typing import NDArray
from tokenizers import Tokenizer

from quire.models.training.corpus import STREAM_WEIGHTS, Corpus, Exchange
from quire.models.training.tokenizer import CHAT_TEMPLATE, END_OF_TEXT

Ids = NDArray[np.int32]

_GREETINGS = [
    Exchange("Hello!", "Hello! Ask me about a function of Python's standard library."),
    Exchange("Hi", "Hello! What would you like to know about Python?"),
    Exchange("Who are you?", "I am quire's demo model, a very small language model trained on Python's standard library."),
    Exchange("What can you do?", "I can complete Python code and say what some functions of the standard library do."),
    Exchange("Thanks!", "You are welcome."),
    Exchange("What is Python?", "Python is an interpreted, object-oriented, high-level programming language with dynamic semantics."),
]  # fmt: skip
_LINE_BREAK, _SPACE = "\u010a", "\u0120"  # how byte-level BPE writes them
_SPLIT_WORD_RATE, _SPLIT_BREAK_RATE, _SPLIT_SECOND_WORD_RATE = 0.03, 0.08, 0.20


@dataclass(frozen=True)
class Stream:
    """Documents laid end to end, each followed by <|endoftext|>.

    `starts` is where a row may begin: at a line, as prompts do, or in chats only at a document.
    """

    ids: Ids
    starts: NDArray[np.int64]


def encode_streams(corpus: Corpus, tokenizer: Tokenizer, seed: int | None) -> dict[str, Stream]:
    """Encodes every stream. With a seed (training) documents are shuffled and some token boundaries moved, see `_split_some`."""
    texts = {name: list(documents) for name, documents in corpus.documents.items()}
    texts["chat"] = list(_render_chats(corpus.exchanges + (_GREETINGS * 12 if seed is not None else [])))
    return {
        name: _encode(texts[name], tokenizer, None if seed is None else [seed, index], at_lines=name != "chat")
        for index, name in enumerate(STREAM_WEIGHTS)
    }


def _render_chats(exchanges: list[Exchange]) -> Iterator[str]:
    """One chat per exchange; every fourth also carries the exchange before it as an earlier turn."""
    template = Template(CHAT_TEMPLATE)
    for index, exchange in enumerate(exchanges):
        turns = [exchange] if index % 4 or not index else [exchanges[index - 1], exchange]
        messages = [{"role": "system", "content": exchange.system}] if exchange.system else []
        for turn in turns:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        yield template.render(messages=messages, add_generation_prompt=False)


def _encode(texts: list[str], tokenizer: Tokenizer, seed: list[int] | None, *, at_lines: bool) -> Stream:
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], np.int32)
    breaks = np.array([idx for token, idx in tokenizer.get_vocab().items() if token.startswith(_LINE_BREAK)], np.int32)
    encoded = [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(texts)]
    if seed is not None:
        rng = np.random.default_rng(seed)
        encoded = [_split_some(encoded[index], tokenizer, breaks, rng) for index in rng.permutation(len(encoded))]
    ids = np.concatenate([part for document in encoded for part in (document, end)] or [end[:0]])
    before_starts = np.isin(ids, [*end, *breaks] if at_lines else end)[:-1]
    return Stream(ids, np.flatnonzero(np.concatenate([np.ones(min(1, len(ids)), bool), before_starts])))


def _split_some(ids: Ids, tokenizer: Tokenizer, breaks: Ids, rng: np.random.Generator) -> Ids:
    """Replaces a few tokens such as " name" or "\\n    " by their first character and the rest.

    A prompt often ends in a space ("def ") or in a line break, where running text would have merged it with what
    follows. Having seen such splits, above all before the second word of a line, the model knows how to go on.
    """
    heads, tails, rates = _splits(tokenizer)
    begins_line = np.concatenate([[True], np.isin(ids, breaks)])
    is_second_word = np.concatenate([[False], begins_line[:-1]])[: len(ids)] & (rates[ids] == _SPLIT_WORD_RATE)
    chosen = rng.random(len(ids)) < np.where(is_second_word, _SPLIT_SECOND_WORD_RATE, rates[ids])
    out = np.stack([np.where(chosen, heads[ids], ids), np.where(chosen, tails[ids], -1)], axis=1).reshape(-1)
    return out[out >= 0].astype(np.int32)


def _splits(tokenizer: Tokenizer) -> tuple[Ids, Ids, NDArray[np.float64]]:
    """Per token: its first character and the rest as tokens (-1 if it cannot be split), and how often to split it."""
    vocab = tokenizer.get_vocab()
    heads, tails = np.full(len(vocab), -1, np.int32), np.full(len(vocab), -1, np.int32)
    rates = np.zeros(len(vocab))
    for token, idx in vocab.items():
        if len(token) > 1 and token[0] in (_SPACE, _LINE_BREAK) and token[1:] in vocab:
            heads[idx], tails[idx] = vocab[token[0]], vocab[token[1:]]
            rates[idx] = _SPLIT_WORD_RATE if token[0] == _SPACE else _SPLIT_BREAK_RATE
    return heads, tails, rates


@dataclass
class Sampler:
    """Draws rows by the streams' weights; `counters` (rows taken per stream and row length) is all its state."""

    streams: dict[str, Stream]
    seed: int
    counters: dict[str, int] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=lambda: STREAM_WEIGHTS)

    def batch(self, step: int, num_rows: int, length: int) -> Ids:
        """[num_rows, length + 1] token ids for one step."""
        names = list(self.streams)
        weights = np.array([self.weights[name] if len(self.streams[name].ids) > 2 * length else 0.0 for name in names])
        picks = np.random.default_rng([self.seed, step]).choice(len(names), size=num_rows, p=weights / weights.sum())
        return np.stack([self._next_row(names[pick], int(pick), length) for pick in picks])

    def _next_row(self, name: str, stream_idx: int, length: int) -> Ids:
        stream, key = self.streams[name], f"{name}/{length}"
        count = self.counters.get(key, 0)
        self.counters[key] = count + 1
        num_chunks = (len(stream.ids) - 1) // length - 1
        epoch, position = divmod(count, num_chunks)
        start = (
            int(np.random.default_rng([self.seed, stream_idx, length, epoch]).permutation(num_chunks)[position])
            * length
        )
        start = int(stream.starts[min(int(np.searchsorted(stream.starts, start)), len(stream.starts) - 1)])
        start = min(start, len(stream.ids) - length - 1)
        return stream.ids[start : start + length + 1]


def held_out_rows(stream: Stream, num_rows: int, length: int) -> Ids:
    """Up to `num_rows` rows [rows, length + 1], evenly spread over the stream; none if it is too short."""
    num_chunks = max(0, (len(stream.ids) - 1) // length)
    picks = np.unique(np.linspace(0, num_chunks - 1, min(num_rows, num_chunks)).astype(int))
    return stream.ids[picks[:, None] * length + np.arange(length + 1)[None, :]]


def token_byte_lengths(tokenizer: Tokenizer) -> NDArray[np.float64]:
    """[V] bytes of UTF-8 that each token stands for; 0 for special tokens."""
    lengths = np.zeros(tokenizer.get_vocab_size())
    for token, idx in tokenizer.get_vocab().items():
        lengths[idx] = 0 if token.startswith("<|") and token.endswith("|>") else len(token)
    return lengths
