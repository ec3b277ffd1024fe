"""What OpenAI's two generating endpoints have in common: the fields of a request, what they mean, and usage.

A field that is not here is unknown and refused by name. Fields that would change the output and cannot be honoured are listed in
`REFUSED`: their neutral values pass, anything else is a 400 that says what to do.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

from msgspec import Meta, Struct

from quire.engine.outputs import RequestOutput
from quire.engine.sampling_params import RequestOutputKind, SamplingParams
from quire.kernels.errors import InvalidRequestError
from quire.server.responses import ModelNotFoundError
from quire.server.state import ServerState


class StreamOptions(Struct, forbid_unknown_fields=True):
    """What a stream carries beside text. `include_obfuscation` is accepted and never needed: nothing is hidden in lengths here."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(Struct):
    """Only {"type": "text"} until structured output is supported."""

    type: str


class GenerationFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of completions and chat completions; null is the same as left out. The extras are spelled as vLLM spells them."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[int, float] | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    num_speculative_tokens: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    # Of no effect on the output: notes of the caller's, and hints to services that this is not.
    user: Annotated[str | None, Meta(description="Accepted; of no effect.")] = None
    metadata: Annotated[dict[str, Any] | None, Meta(description="Accepted; of no effect.")] = None
    store: Annotated[bool | None, Meta(description="Accepted; of no effect: nothing is ever stored.")] = None
    service_tier: Annotated[str | None, Meta(description="Accepted; of no effect.")] = None
    safety_identifier: Annotated[str | None, Meta(description="Accepted; of no effect.")] = None
    prompt_cache_key: Annotated[str | None, Meta(description="Accepted; of no effect: prompts are cached anyway.")] = (
        None
    )
    prompt_cache_retention: Annotated[str | None, Meta(description="Accepted; of no effect.")] = None

    # Refused unless neutral: see REFUSED.
    response_format: ResponseFormat | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None
    logits_processors: Any = None
    truncate_prompt_tokens: int | None = None


MAX_STOP_STRINGS = 64  # each is looked for in every piece of text, on the event loop
# Lists are walked in Python, so that even one of the same few items over and over costs the time of all others.
_MAX_ITEMS = {"stop": MAX_STOP_STRINGS, "stop_token_ids": 1024, "bad_words": 1024}

STRUCTURED = "structured output is not supported yet; describe the format in the prompt and check the answer"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_beam_search": ((False,), "beam search is not supported; sample several with n"),
    "length_penalty": ((1.0,), "it belongs to beam search, which is not supported"),
    "guided_json": ((), STRUCTURED),
    "guided_regex": ((), STRUCTURED),
    "guided_choice": ((), STRUCTURED),
    "guided_grammar": ((), STRUCTURED),
    "structured_outputs": ((), STRUCTURED),
    "logits_processors": (
        ([],),
        "code from requests is never run; logit_bias, bad_words and allowed_token_ids may serve",
    ),
    "truncate_prompt_tokens": ((), "prompts are never cut; send the part that you want to be read"),
    "suffix": (("",), "the models here do not fill in; leave it out"),
    "modalities": ((["text"],), "only text is made"),
    "audio": ((), "only text is made"),
    "reasoning_effort": ((), "the model has no such setting; some chat templates take one in chat_template_kwargs"),
    "prediction": ((), "predicted outputs are not supported"),
    "web_search_options": ((), "the server has no network of its own"),
    "functions": (([],), "it was replaced by tools"),
    "function_call": (("none",), "it was replaced by tool_choice"),
    "verbosity": ((), "the model has no such setting"),
    "chat_template": ((), "templates are programs, and only the operator's are run: quire serve --chat-template FILE"),
    "documents": (([],), "give documents to the template in chat_template_kwargs"),
}


class PromptTokensDetails(Struct):
    """How much of the prompt was found in the prefix cache."""

    cached_tokens: int


class Usage(Struct):
    """Tokens of a request: prompts once each, completions summed over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class UsageCounter:
    """Adds up the usage of one HTTP request from its outputs."""

    def __init__(self) -> None:
        self._prompts: dict[str, tuple[int, int]] = {}
        self._num_completion = 0

    def add(self, output: RequestOutput) -> None:
        """Takes a delta, or a final output, in."""
        self._prompts[output.request_id] = (len(output.prompt_token_ids), output.num_cached_tokens)
        self._num_completion += sum(len(choice.token_ids) for choice in output.outputs)

    def usage(self, num_hidden: int = 0) -> Usage:
        """The sums so far; `num_hidden` completion tokens were made and are not shown."""
        num_prompt = sum(count for count, _ in self._prompts.values())
        num_completion = max(self._num_completion - num_hidden, 0)  # of those some may be still to come
        cached = sum(count for _, count in self._prompts.values())
        return Usage(num_prompt, num_completion, num_prompt + num_completion, PromptTokensDetails(cached))


def check_common(body: GenerationFields, state: ServerState) -> None:
    """Raises InvalidRequestError for what is refused, ModelNotFoundError for another model than the one served."""
    check_model(body.model, state)
    for name, (neutral, remedy) in REFUSED.items():
        value = getattr(body, name, None)
        if value is not None and value not in neutral:
            raise InvalidRequestError(f"{name} is not supported: {remedy}", parameter=name)
    check_num_items(body, state)
    if body.response_format is not None and body.response_format.type != "text":
        raise InvalidRequestError(
            f"response_format {body.response_format.type!r} is not supported: {STRUCTURED}", parameter="response_format"
        )
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequestError(
            "best_of is not supported; ask for n choices and choose yourself", parameter="best_of"
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options needs stream: true", parameter="stream_options")


def check_num_items(body: Struct, state: ServerState) -> None:
    """Raises InvalidRequestError for lists that are longer than any use of them."""
    vocab_size = state.engine.info.vocab_size if state.engine.info is not None else None
    limits = _MAX_ITEMS | ({} if vocab_size is None else {"allowed_token_ids": vocab_size})
    for name, most in limits.items():
        value = getattr(body, name, None)
        if isinstance(value, list) and len(value) > most:
            raise InvalidRequestError(f"{name} has {len(value)} items, and at most {most} are taken", parameter=name)


def check_choices(state: ServerState, num_choices: int, parameter: str = "n") -> None:
    """Raises InvalidRequestError for more choices than the queue could ever hold, before work is done for them."""
    settings = state.engine.scheduler_settings
    most = 0 if settings is None else settings.max_queued_requests
    if most and num_choices > most:
        raise InvalidRequestError(
            f"{num_choices} choices at once are more than the queue holds, {most}; send them in parts",
            parameter=parameter,
        )


def check_model(model: str | None, state: ServerState) -> None:
    """Raises ModelNotFoundError for another model than the one served; none at all stands for it."""
    if model is not None and model != state.model_name:
        raise ModelNotFoundError(
            f"there is no model {model!r} here; this server has {state.model_name!r}", parameter="model"
        )


_SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "logit_bias",
    "top_k",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "stop_token_ids",
    "min_tokens",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "num_speculative_tokens",
)


def sampling_params(body: GenerationFields, **more: Any) -> SamplingParams:
    """The request's sampling parameters; `more` are those that the endpoints spell in their own ways.

    Raises InvalidRequestError naming the parameter.
    """
    given = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams(**{**given, **more}, output_kind=kind)


def make_id(prefix: str) -> str:
    """A fresh id of a response, such as cmpl-8f14e45f..."""
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since the epoch, as OpenAI's `created`."""
    return int(time.time())
