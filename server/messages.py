"""What passes between the server and its engine process: plain messages, msgpack, one length-prefixed frame each.

server --Start, Submit, Abort, Configure, Stop--> engine process
server <--Progress, Ready, Outputs, Rejected, Configured, Failed-- engine process

A frame is a 4-byte little-endian length and as many bytes of msgpack. Either side takes the end of the stream as the other's death.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import msgspec

from quire.engine.metrics import EngineStats
from quire.engine.outputs import FinishReason
from quire.engine.request import EngineCoreRequest
from quire.engine.sampling_params import RequestOutputKind, SamplingParams
from quire.engine.step_data import DraftRound, EngineCoreOutput, TokenLogprobs
from quire.kernels import errors

HEADER = struct.Struct("<I")


class Start(msgspec.Struct, tag=True):
    """The first message: the engine's settings, as flat arguments."""

    arguments: dict[str, Any]


class Submit(msgspec.Struct, tag=True):
    """One request for the engine core. `params` are the SamplingParams that differ from the defaults."""

    request_id: str
    prompt_token_ids: list[int]
    params: dict[str, Any]
    arrival_time: float
    eos_token_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]
    priority: int
    cache_salt: str | None

    @classmethod
    def of(cls, request: EngineCoreRequest) -> Submit:
        """The message that carries a request."""
        return cls(
            request_id=request.request_id,
            prompt_token_ids=list(request.prompt_token_ids),
            params=_params_fields(request.params),
            arrival_time=request.arrival_time,
            eos_token_ids=request.eos_token_ids,
            bad_words=request.bad_words,
            priority=request.priority,
            cache_salt=request.cache_salt,
        )

    def request(self) -> EngineCoreRequest:
        """The request that was sent, equal to the one given to `of`."""
        return EngineCoreRequest(
            request_id=self.request_id,
            prompt_token_ids=tuple(self.prompt_token_ids),
            params=SamplingParams(**{**self.params, "output_kind": RequestOutputKind.DELTA}),
            arrival_time=self.arrival_time,
            eos_token_ids=self.eos_token_ids,
            bad_words=self.bad_words,
            priority=self.priority,
            cache_salt=self.cache_salt,
        )


class Abort(msgspec.Struct, tag=True):
    """Ends requests; `has_finished` when they came to their end at a stop string."""

    request_ids: list[str]
    has_finished: bool = False


class Configure(msgspec.Struct, tag=True):
    """Changes scheduler settings; answered by Configured with the same number."""

    number: int
    changes: dict[str, Any]


class Stop(msgspec.Struct, tag=True):
    """The engine process ends, whatever is open."""


ToEngine = Start | Submit | Abort | Configure | Stop


class Progress(msgspec.Struct, tag=True):
    """How far start-up is: phase is start, load, compile or ready."""

    phase: str = "start"
    done: int = 0
    total: int = 0
    what: str = ""


class EngineInfo(msgspec.Struct):
    """What the server must know of a model that is ready."""

    model: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    block_size: int
    num_kv_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: str
    platform: str
    device_kind: str
    sampling: str
    scheduling_policy: str
    enable_prefix_caching: bool
    num_programs: int
    ready_seconds: float


class Ready(msgspec.Struct, tag=True):
    """Every shape is compiled: requests may come. `settings` are the scheduler settings that can change."""

    info: EngineInfo
    settings: dict[str, Any]
    stats: dict[str, Any]


class TokenOutput(msgspec.Struct, array_like=True):
    """An EngineCoreOutput on the wire."""

    request_id: str
    new_token_ids: list[int]
    logprobs: list[tuple[float, int, tuple[int, ...], tuple[float, ...]]] | None
    prompt_logprobs: list[tuple[float, int, tuple[int, ...], tuple[float, ...]]] | None
    finish_reason: FinishReason | None
    stop_reason: int | None
    num_cached_tokens: int
    num_preemptions: int
    first_scheduled_time: float | None
    rounds: list[DraftRound]

    @classmethod
    def of(cls, output: EngineCoreOutput) -> TokenOutput:
        """The message that carries an output."""
        return cls(
            output.request_id,
            output.new_token_ids,
            _pack(output.logprobs),
            _pack(output.prompt_logprobs),
            *output[4:-1],
            list(output.rounds),
        )

    def output(self) -> EngineCoreOutput:
        """The output that was sent, equal to the one given to `of`."""
        return EngineCoreOutput(
            self.request_id,
            self.new_token_ids,
            _unpack(self.logprobs),
            _unpack(self.prompt_logprobs),
            self.finish_reason,
            self.stop_reason,
            self.num_cached_tokens,
            self.num_preemptions,
            self.first_scheduled_time,
            self.rounds,
        )


class Outputs(msgspec.Struct, tag=True):
    """What one step brought. `num_step_tokens` counts what was given to the device, 0 when no step was launched.

    `stats` is the newest EngineStats, sent a few times a second and when the engine falls idle.
    """

    outputs: list[TokenOutput]
    num_step_tokens: int
    stats: dict[str, Any] | None = None


class Rejected(msgspec.Struct, tag=True):
    """A request that the engine core would not take."""

    request_id: str
    error: str
    message: str
    parameter: str | None


class Configured(msgspec.Struct, tag=True):
    """The answer to Configure: the settings that hold now, and why nothing was changed, if so."""

    number: int
    settings: dict[str, Any]
    message: str | None


class Failed(msgspec.Struct, tag=True):
    """The last message of an engine that could not start, or whose step failed. `error` is the name of the error's class."""

    error: str
    message: str


FromEngine = Progress | Ready | Outputs | Rejected | Configured | Failed

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    """A message as it goes over the socket, length first."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


def decode_to_engine(body: bytes) -> ToEngine:
    """The message of a frame's body, without its length."""
    return _to_engine.decode(body)


def decode_from_engine(body: bytes) -> FromEngine:
    """The message of a frame's body, without its length."""
    return _from_engine.decode(body)


def stats_of(fields: dict[str, Any]) -> EngineStats:
    """An EngineStats from the fields that came over the socket."""
    return EngineStats(**fields)


def error_of(name: str, message: str, parameter: str | None = None) -> errors.QuireError:
    """The error of that class; EngineDeadError for one that quire does not raise on purpose."""
    found = getattr(errors, name, None)
    if found is errors.InvalidRequestError:
        return errors.InvalidRequestError(message, parameter=parameter)
    if isinstance(found, type) and issubclass(found, errors.QuireError) and found is not errors.QueueFullError:
        return found(message)
    return errors.EngineDeadError(f"{name}: {message}")


_DEFAULTS = SamplingParams()
_PARAM_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams) if field.name != "output_kind")


def _params_fields(params: SamplingParams) -> dict[str, Any]:
    return {name: value for name in _PARAM_NAMES if (value := getattr(params, name)) != getattr(_DEFAULTS, name)}


def _pack(entries: list[TokenLogprobs] | None) -> Any:
    if entries is None:
        return None
    return [(entry.logprob, entry.rank, entry.top_ids, entry.top_logprobs) for entry in entries]


def _unpack(entries: Any) -> list[TokenLogprobs] | None:
    return None if entries is None else [TokenLogprobs(*entry) for entry in entries]
