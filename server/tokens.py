"""/tokenize, /detokenize, /v1/models and /version: what a client asks before it generates."""

from __future__ import annotations

import asyncio
import importlib.metadata
from typing import Any

from msgspec import Struct, field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from quire.kernels.errors import InvalidRequestError, NotServingError
from quire.server.openapi import Operation
from quire.server.prompts import MAX_COUNTED_CHARS, encode, render, tokenizer_of
from quire.server.protocol import check_model, now
from quire.server.responses import json_response, read_body
from quire.server.state import ServerState, state_of


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """A prompt or a conversation, one of them. Special tokens are added to prompts, not to conversations, unless told."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(Struct):
    """Token ids; `token_strs` are spelled as the vocabulary does."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Token ids whose text is wanted, special tokens included."""

    tokens: list[int]
    model: str | None = None


class DetokenizeResponse(Struct):
    """The text."""

    prompt: str


class ModelCard(Struct, kw_only=True):
    """The model that is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "quire"
    root: str
    max_model_len: int | None


class ModelList(Struct):
    """Every model that is served: one."""

    data: list[ModelCard]
    object: str = "list"


class Version(Struct):
    """The server's version."""

    version: str = field(default_factory=lambda: importlib.metadata.version("quire"))


_STARTED = now()


def _card(state: ServerState) -> ModelCard:
    info = state.engine.info
    root = state.model_name if info is None else info.model
    return ModelCard(
        id=state.model_name, created=_STARTED, root=root, max_model_len=None if info is None else info.max_model_len
    )


async def list_models(request: Request) -> Response:
    """Answers GET /v1/models."""
    return json_response(ModelList([_card(state_of(request))]))


async def get_model(request: Request) -> Response:
    """Answers GET /v1/models/{model}."""
    state = state_of(request)
    check_model(request.path_params["model"], state)
    return json_response(_card(state))


async def version(request: Request) -> Response:
    """Answers GET /version."""
    return json_response(Version())


async def tokenize(request: Request) -> Response:
    """Answers POST /tokenize."""
    state = state_of(request)
    body = await read_body(request, TokenizeRequest)
    check_model(body.model, state)
    tokenizer, info = tokenizer_of(state), state.engine.info
    if info is None:
        raise NotServingError("the server is starting; /ready tells when it is done")
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give either prompt or messages", parameter="prompt")
    if body.messages is not None:
        tokens = await render(
            state,
            body.messages,
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs,
            add_special_tokens=bool(body.add_special_tokens),
            at_least=MAX_COUNTED_CHARS,
        )
    else:
        assert body.prompt is not None
        tokens = await encode(
            state, body.prompt, add_special_tokens=body.add_special_tokens is not False, at_least=MAX_COUNTED_CHARS
        )
    strings = None
    if body.return_token_strs:
        strings = await asyncio.to_thread(lambda: [tokenizer.id_to_token(token) or "" for token in tokens])
    return json_response(TokenizeResponse(len(tokens), info.max_model_len, tokens, strings))


async def detokenize(request: Request) -> Response:
    """Answers POST /detokenize."""
    state = state_of(request)
    body = await read_body(request, DetokenizeRequest)
    check_model(body.model, state)
    tokenizer = tokenizer_of(state)
    if len(body.tokens) > MAX_COUNTED_CHARS:
        raise InvalidRequestError(
            f"{len(body.tokens)} tokens are more than the {MAX_COUNTED_CHARS} of one body; send them in parts",
            parameter="tokens",
        )
    for token in (min(body.tokens, default=0), max(body.tokens, default=0)):
        if not 0 <= token < tokenizer.vocab_size:
            raise InvalidRequestError(
                f"token id {token} is outside the vocabulary, 0 to {tokenizer.vocab_size - 1}", parameter="tokens"
            )
    text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
    return json_response(DetokenizeResponse(text))


routes = [
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{model:path}", get_model, methods=["GET"]),
    Route("/version", version, methods=["GET"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
]

OPERATIONS = (
    Operation("GET", "/v1/models", "The models that are served.", None, ModelList, tag="OpenAI"),
    Operation("GET", "/v1/models/{model}", "One model.", None, ModelCard, errors=(404,), tag="OpenAI"),
    Operation("GET", "/version", "The server's version.", None, Version, needs_key=False),
    Operation(
        "POST",
        "/tokenize",
        "Text or a conversation to token ids.",
        TokenizeRequest,
        TokenizeResponse,
        errors=(404, 503),
    ),
    Operation("POST", "/detokenize", "Token ids to text.", DetokenizeRequest, DetokenizeResponse, errors=(404,)),
)
