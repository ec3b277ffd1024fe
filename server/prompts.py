"""From what a body holds to token ids: texts and conversations, off the event loop where they are long, and only as far as of use.

Tokenizing takes a hundred times a text's size in memory, and seconds for megabytes, so what could never fit is refused by its length.
"""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec import to_builtins

from quire.engine.tokenizer import Tokenizer
from quire.kernels.errors import InvalidRequestError
from quire.server.state import ServerState

MAX_COUNTED_CHARS = 2**20  # of a text that is tokenized for its own sake, which may be longer than a prompt
INLINE_CHARS = 2000  # a shorter text is tokenized on the spot: another thread would cost more than it saves
# Arguments of transformers' apply_chat_template that are none of the template's, or fields of the request themselves.
_RESERVED = frozenset(
    [
        "conversation",
        "messages",
        "tools",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    ]
)


def tokenizer_of(state: ServerState) -> Tokenizer:
    """The model's tokenizer. Raises InvalidRequestError where it came with none."""
    if state.engine.tokenizer is None:
        raise InvalidRequestError(
            "the model has no tokenizer and no chat template; send token ids to /v1/completions", parameter="prompt"
        )
    return state.engine.tokenizer


def check_length(state: ServerState, text: str, *, at_least: int = 0, parameter: str = "prompt") -> None:
    """Raises InvalidRequestError for a text of more characters than max_model_len tokens have; `at_least` are always let through."""
    info, tokenizer = state.engine.info, state.engine.tokenizer
    if info is None or tokenizer is None:
        return
    most = max(info.max_model_len * tokenizer.max_token_chars, at_least)
    if len(text) > most:
        raise InvalidRequestError(
            f"{parameter} has {len(text)} characters, and this server reads at most {most} (max_model_len is "
            f"{info.max_model_len} tokens); shorten it",
            parameter=parameter,
        )


async def encode(
    state: ServerState,
    text: str,
    *,
    add_special_tokens: bool = True,
    at_least: int = 0,
    parameter: str = "prompt",
) -> list[int]:
    """The token ids of a text. Raises InvalidRequestError as `check_length` does, and for what is no Unicode."""
    tokenizer = tokenizer_of(state)
    check_length(state, text, at_least=at_least, parameter=parameter)
    if len(text) < INLINE_CHARS:
        return tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)


async def render(
    state: ServerState,
    messages: list[dict[str, Any]],
    *,
    tools: list[Any] | None,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    template_kwargs: dict[str, Any] | None,
    add_special_tokens: bool,
    at_least: int = 0,
) -> list[int]:
    """The conversation as token ids, rendered off the event loop. Raises InvalidRequestError for what the template refuses."""
    tokenizer = tokenizer_of(state)
    if continue_final_message and add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message leaves the last message open, and add_generation_prompt begins a new one; choose one",
            parameter="continue_final_message",
        )
    kwargs: dict[str, Any] = dict(template_kwargs or {})
    if reserved := sorted(_RESERVED & set(kwargs)):
        raise InvalidRequestError(
            f"chat_template_kwargs cannot set {reserved[0]}, which is not the template's; leave it out, or give it as a field "
            "of the request where there is one",
            parameter="chat_template_kwargs",
        )
    kwargs["continue_final_message"] = bool(continue_final_message)
    if state.chat_template is not None:
        kwargs["chat_template"] = state.chat_template
    generation_prompt = not continue_final_message if add_generation_prompt is None else add_generation_prompt

    def work() -> str:
        try:
            if tools:
                kwargs["tools"] = to_builtins(tools)
            return tokenizer.render_chat_template(messages, add_generation_prompt=generation_prompt, **kwargs)
        except RecursionError as error:
            raise InvalidRequestError("tools are nested too deeply; flatten them", parameter="tools") from error

    text = await asyncio.to_thread(work)
    token_ids = await encode(
        state, text, add_special_tokens=False, at_least=at_least
    )  # the template spells out its own
    return [*tokenizer.encode(""), *token_ids] if add_special_tokens else token_ids
