"""Text to token ids and back: a thin face over a transformers tokenizer, read from a local folder.

Owns the choice of what of transformers is used: the Rust backend, called directly (its calls change no state, so any
thread may make them), and the chat template. Knows nothing of requests; `detokenizer` turns a growing sequence into
text.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from quire.engine.sampling_params import is_unicode
from quire.kernels.errors import InvalidConfigError, InvalidRequestError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "tekken.json")
"""A folder holds a tokenizer if it has one of these; with the first, nothing has to be converted."""


class Tokenizer:
    """A tokenizer and its chat template. Make one with `load_tokenizer`."""

    def __init__(self, hf_tokenizer: Any) -> None:
        """`hf_tokenizer` is a fast transformers tokenizer (one with a `tokenizers.Tokenizer` inside)."""
        self._hf = hf_tokenizer
        self._backend: tokenizers.Tokenizer = hf_tokenizer.backend_tokenizer
        # A tokenizer.json may carry the truncation and padding of its training; a prompt gets neither.
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self.added_token_ids: frozenset[int] = frozenset(added)
        """Tokens that never come from merges: special ones, and words added whole."""
        self.all_special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        """Tokens that `skip_special_tokens` leaves out of a text."""
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values(), default=-1) + 1
        """One more than the largest token id. A model may have more rows than this, never fewer in use."""
        self.max_token_chars: int = max(map(len, vocab), default=1)
        """Characters of the longest token as the vocabulary spells it, which is never shorter than its text."""
        self.eos_token_id: int | None = hf_tokenizer.eos_token_id
        anchor = self.encode("a", add_special_tokens=False)[-1:]
        self._anchor = (anchor, self.decode(anchor, skip_special_tokens=False))
        self._token_texts: dict[int, str] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`; `add_special_tokens` adds what the model expects around a prompt (such as BOS).

        Raises `InvalidRequestError` for what is no Unicode text.
        """
        if not isinstance(text, str) or not is_unicode(text):
            raise InvalidRequestError(
                f"a prompt must be a string of Unicode text (no lone surrogates), got {_short(text)}.",
                parameter="prompt",
            )
        # A batch of one: unlike `encode` it lets other threads run meanwhile, and keeps no offsets, which a long text makes large.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, with U+FFFD for bytes that are no UTF-8; ids outside the vocabulary have no text.

        Unlike transformers it never "cleans up" spaces before punctuation, which no stream could do.
        """
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def vocabulary(self) -> dict[str, int]:
        """Every token's id by its spelling, added ones included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (`Ġthe`, `▁the`, `<0xE4>`), or None outside the vocabulary."""
        return self._backend.id_to_token(token_id) if token_id >= 0 else None

    def token_text(self, token_id: int) -> str:
        """The token's own text as it stands inside a text, leading space included: `Logprob.decoded_token`.

        Special tokens are spelled out. A token that is part of a character is U+FFFD; an unknown id is empty.
        """
        text = self._token_texts.get(token_id)
        if text is None:
            # Decoded after a plain letter, because SentencePiece drops the space of a token that begins a text.
            anchor, anchor_text = self._anchor
            text = self.decode([*anchor, token_id], skip_special_tokens=False)
            if text.startswith(anchor_text):
                text = text[len(anchor_text) :]
            else:
                text = self.decode([token_id], skip_special_tokens=False)
            self._token_texts[token_id] = text
        return text

    @property
    def chat_template(self) -> str | None:
        """The chat template's source, None where the model came with none; the default one of several."""
        template = self._hf.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @property
    def has_chat_template(self) -> bool:
        """Whether the model came with a chat template."""
        return bool(self._hf.chat_template)

    def apply_chat_template(
        self, messages: Sequence[Any], add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> list[int]:
        """The prompt's token ids for a conversation: `{"role": ..., "content": ...}` messages, oldest first.

        `content` is a string, a list of `{"type": "text", "text": ...}` parts (joined with newlines), or None beside
        `tool_calls`. `add_generation_prompt` ends the prompt where the assistant begins to speak. `template_kwargs`
        go to transformers' `apply_chat_template` (`chat_template`, `tools`, `documents`, `continue_final_message`) and
        from there to the template. Raises `InvalidRequestError` for malformed messages, for a model without a
        template, and for messages that the template refuses.
        """
        text = self.render_chat_template(messages, add_generation_prompt, **template_kwargs)
        return self.encode(text, add_special_tokens=False)  # the template spells out its special tokens

    def render_chat_template(
        self, messages: Sequence[Any], add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> str:
        """The prompt of `apply_chat_template` as text. Raises as that does."""
        conversation = _checked_messages(messages)
        if not (self.has_chat_template or template_kwargs.get("chat_template")):
            raise InvalidRequestError(
                "this model has no chat template (it is a base model, or its tokenizer_config.json lacks one). "
                "Pass chat_template=..., or complete a plain prompt instead.",
                parameter="messages",
            )
        try:
            rendered = self._hf.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
            )
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(
                f"the chat template refused the messages: {error}. Check the roles, their order and the arguments "
                "against the model's template.",
                parameter="messages",
            ) from error
        return str(rendered)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has a tokenizer of any kind."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in `folder`; reads no network and runs no code from the folder.

    Raises `InvalidConfigError` where the folder has no tokenizer, a broken one, or one only in Python.
    """
    folder = Path(folder)
    if not has_tokenizer(folder):
        raise InvalidConfigError(
            f"no tokenizer in {folder}: expected one of {', '.join(TOKENIZER_FILES)}. "
            "Copy the tokenizer's files there (AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes them)."
        )
    try:
        hf_tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust library's own errors are of this very class
        raise InvalidConfigError(
            f"the tokenizer in {folder} cannot be read: {error}. Check that its files are whole, and that it has a "
            "tokenizer.json."
        ) from error
    if not hf_tokenizer.is_fast:
        raise InvalidConfigError(
            f"the tokenizer in {folder} ({type(hf_tokenizer).__name__}) exists only in Python, which is too slow to "
            "stream with. Convert it to a tokenizer.json."
        )
    return Tokenizer(hf_tokenizer)


def _checked_messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequestError(
            f"messages must be a list of at least one {{'role': ..., 'content': ...}}, got {_short(messages)}.",
            parameter="messages",
        )
    return [_checked_message(message, position) for position, message in enumerate(messages)]


def _checked_message(message: object, position: int) -> dict[str, Any]:
    where = f"messages[{position}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        raise InvalidRequestError(
            f"{where} must be a mapping with a 'role' (such as 'user') and a 'content', got {_short(message)}.",
            parameter="messages",
        )
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise InvalidRequestError(f"{where} has no 'content': give it a string.", parameter="messages")
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, list | tuple):
        raise InvalidRequestError(
            f"{where}['content'] must be a string or a list of text parts, got {_short(content)}.",
            parameter="messages",
        )
    return {**message, "content": "\n".join(_part_texts(content, where))}


def _part_texts(parts: Iterable[object], where: str) -> Iterable[str]:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequestError(
                f"{where}['content'] holds {_short(part)}: only text can be given to this engine, as "
                "{'type': 'text', 'text': ...}.",
                parameter="messages",
            )
        yield part["text"]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
