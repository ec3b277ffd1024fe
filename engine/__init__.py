"""The engine: requests, scheduler, KV cache, the compiled step, and `LLM`, which puts them together."""

from quire.engine.llm import LLM
from quire.engine.outputs import CompletionOutput, Logprob, RequestOutput
from quire.engine.sampling_params import RequestOutputKind, SamplingParams
from quire.kernels.errors import (
    BackendError,
    CheckpointError,
    EngineDeadError,
    InvalidConfigError,
    InvalidRequestError,
    KernelUnavailableError,
    ModelError,
    OutOfBlocksError,
    QuireError,
    UnsupportedModelError,
)

__all__ = [
    "LLM",
    "BackendError",
    "CheckpointError",
    "CompletionOutput",
    "EngineDeadError",
    "InvalidConfigError",
    "InvalidRequestError",
    "KernelUnavailableError",
    "Logprob",
    "ModelError",
    "OutOfBlocksError",
    "QuireError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "UnsupportedModelError",
]
