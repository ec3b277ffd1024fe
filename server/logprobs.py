"""Log-probabilities in the three shapes that clients read: completions, chat, and vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from quire.engine.outputs import Logprob

Entries = Sequence[dict[int, Logprob] | None]


class CompletionLogprobs(Struct):
    """Lists over tokens. In `top_logprobs` tokens of the same text share an entry, which has the larger number.

    `text_offset` counts characters of the choice's text. The first token of an echoed prompt has no log-probability: null.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TopLogprob(Struct):
    """One of the most likely tokens at a position. `bytes` is its text in UTF-8."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(Struct):
    """A token of the answer and the most likely ones at its position, the likeliest first."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Log-probabilities of a choice's tokens."""

    content: list[ChatLogprob]
    refusal: None = None


class PromptLogprob(Struct):
    """vLLM's entry: a token's log-probability, its rank from 1, its text."""

    logprob: float
    rank: int | None
    decoded_token: str | None


def token_name(token_id: int, logprob: Logprob | None, as_ids: bool) -> str:
    """How a token is called: its text, or `token_id:N` where the caller asked for that."""
    if as_ids or logprob is None or logprob.decoded_token is None:
        return f"token_id:{token_id}"
    return logprob.decoded_token


def completion_logprobs(
    token_ids: Sequence[int], entries: Entries, num_top: int, *, as_ids: bool, offset: int = 0, first_text: str = ""
) -> CompletionLogprobs:
    """Entry i belongs to token i; `offset` is where the first token's text begins; `first_text` stands for a token without an entry."""
    found = CompletionLogprobs([], [], [], [])
    for token_id, entry in zip(token_ids, entries, strict=True):
        own = None if entry is None else entry[token_id]
        text = first_text if own is None and not as_ids else token_name(token_id, own, as_ids)
        found.text_offset.append(offset)
        found.token_logprobs.append(None if own is None else own.logprob)
        found.tokens.append(text)
        found.top_logprobs.append(None if entry is None else _top(entry, num_top, as_ids))
        offset += len(own.decoded_token or "") if own is not None else len(first_text)
    return found


def _top(entry: dict[int, Logprob], num_top: int, as_ids: bool) -> dict[str, float]:
    top: dict[str, float] = {}
    for token_id, logprob in sorted(entry.items(), key=lambda item: item[1].rank or 0):
        is_own = next(iter(entry)) == token_id
        if is_own or (logprob.rank or 0) <= num_top:
            name = token_name(token_id, logprob, as_ids)
            top[name] = max(logprob.logprob, top.get(name, float("-inf")))
    return top


def chat_logprobs(token_ids: Sequence[int], entries: Entries, num_top: int, *, as_ids: bool) -> ChatLogprobs:
    """Entry i belongs to token i; at most `num_top` alternatives each."""
    content = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        assert entry is not None
        ranked = sorted(entry.items(), key=lambda item: item[1].rank or 0)
        top = [_top_logprob(*item, as_ids) for item in ranked if (item[1].rank or 0) <= num_top]
        own = _top_logprob(token_id, entry[token_id], as_ids)
        content.append(ChatLogprob(own.token, own.logprob, own.bytes, top))
    return ChatLogprobs(content)


def _top_logprob(token_id: int, logprob: Logprob, as_ids: bool) -> TopLogprob:
    text = logprob.decoded_token
    return TopLogprob(
        token_name(token_id, logprob, as_ids), logprob.logprob, None if text is None else list(text.encode())
    )


def prompt_logprobs(entries: Entries | None) -> list[dict[str, PromptLogprob] | None] | None:
    """vLLM's shape: per prompt token a dict from token id to entry, null for the first token."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token_id): PromptLogprob(found.logprob, found.rank, found.decoded_token)
            for token_id, found in entry.items()
        }
        for entry in entries
    ]
