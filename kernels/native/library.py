"""Loads the C++ kernels for one instruction set, and registers their handlers with XLA.

A library is built for each instruction set when quire is installed (setup.py). Which of them can run is read from the processor's flags,
which the backend hands down; the kernels are then implementations of their ops like any other, named `native_<instruction set>`.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from quire.kernels.errors import KernelUnavailableError
from quire.kernels.op import OpContext

# The most wanted first, with the processor's flags (as Linux names them) that each needs.
INSTRUCTION_SETS: dict[str, frozenset[str]] = {
    "avx512bf16": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}),
    "avx2": frozenset({"avx2", "fma", "f16c"}),
    "portable": frozenset(),
}
HANDLERS = (
    "quire_linear",
    "quire_columns",
    "quire_new_cache",
    "quire_write_kv",
    "quire_paged_attention",
    "quire_decoder_layer",
    "quire_head_entries",
    "quire_argmax",
    "quire_draw",
    "quire_sample",
)
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2}  # `Format` in matrix.h
DTYPES = ("float32", "bfloat16")  # of activations and cache
PANEL = 32  # columns that are packed together; kPanel in matrix.h
# What transposing keys word by word asks for, and the room that the kernels keep.
MAX_HEAD_DIM = 512


def library_path(instruction_set: str) -> Path:
    """Where setup.py puts a library."""
    return Path(__file__).parent / f"quire_cpu_{instruction_set}.so"


def refuses(instruction_set: str, context: OpContext) -> str | None:
    """Why the kernels of a model's layers cannot serve a context, None when they can."""
    if reason := _cannot_run(instruction_set, context):
        return reason
    if context.dtype not in DTYPES:
        return f"{context.dtype} is not one of {', '.join(DTYPES)}"
    if context.scan_layers:
        return "layers are scanned, and a slice of stacked weights would be copied"
    if context.head_dim % 2 or context.head_dim > MAX_HEAD_DIM:
        return f"head_dim {context.head_dim} is odd or above {MAX_HEAD_DIM}"
    return _cannot_load(instruction_set)


def refuses_any_model(instruction_set: str, context: OpContext) -> str | None:
    """The same for kernels to which the model does not matter, such as the sampler: its logits are always float32."""
    return _cannot_run(instruction_set, context) or _cannot_load(instruction_set)


def _cannot_run(instruction_set: str, context: OpContext) -> str | None:
    if context.platform != "cpu":
        return "needs a CPU"
    if context.num_devices > 1:
        return "several devices share the model"
    missing = INSTRUCTION_SETS[instruction_set] - context.instruction_sets
    if missing:
        return f"the processor lacks {', '.join(sorted(missing))}"
    if not library_path(instruction_set).exists():
        return "not built: install quire again where a C++17 compiler (g++, clang++) is found"
    return None


def _cannot_load(instruction_set: str) -> str | None:
    """Why a library that was built does not load; asked last, since it loads what can be loaded."""
    try:
        load_library(instruction_set)
    except KernelUnavailableError as error:
        return str(error)
    return None


class Library:
    """One loaded library. Knows names and addresses; what the handlers mean is said beside each op."""

    def __init__(self, instruction_set: str) -> None:
        self.instruction_set = instruction_set
        path = library_path(instruction_set)
        try:
            # Registered before there is a client, handlers that XLA refuses would take the whole CPU backend with them.
            jax.devices("cpu")
            self._functions = ctypes.CDLL(str(path))
            for handler in HANDLERS:
                capsule = jax.ffi.pycapsule(getattr(self._functions, handler))
                jax.ffi.register_ffi_target(self.target(handler), capsule, platform="cpu")
        except Exception as error:  # the loader's and XLA's own words are the reason that the user gets to read
            raise KernelUnavailableError(
                f"{path.name} cannot be loaded: {error}; was it built against the headers of a newer jaxlib? Install quire again"
            ) from error
        self._functions.quire_pack.argtypes = [
            ctypes.c_void_p,
            *[ctypes.c_int64] * 4,
            ctypes.c_int32,
            *[ctypes.c_void_p] * 2,
        ]
        self._functions.quire_pack.restype = None
        self._functions.quire_set_max_threads.argtypes = [ctypes.c_int32]
        self._functions.quire_set_max_threads.restype = None

    def target(self, handler: str) -> str:
        """The name under which XLA knows a handler."""
        return f"{handler}_{self.instruction_set}"

    def set_max_threads(self, count: int) -> None:
        """Most threads that one op uses, the calling one included; 0 is as many as XLA has."""
        self._functions.quire_set_max_threads(count)

    def pack(self, matrix: np.ndarray, words: np.ndarray, sums: np.ndarray | None) -> None:
        """Packs a matrix [K, N] of float32, bfloat16 or int8, in any memory order, into `words`; for int8 fills `sums` too."""
        format = FORMATS[matrix.dtype.name]
        k_stride, n_stride = (stride // matrix.itemsize for stride in matrix.strides)
        self._functions.quire_pack(
            matrix.ctypes.data,
            k_stride,
            n_stride,
            *matrix.shape,
            format,
            words.ctypes.data,
            None if sums is None else sums.ctypes.data,
        )


@functools.cache
def load_library(instruction_set: str) -> Library:
    """The library for an instruction set, loaded once. Raises KernelUnavailableError with the loader's words."""
    library = Library(instruction_set)
    _loaded.append(library)
    return library


_loaded: list[Library] = []


def as_mask(is_used: jax.Array | None) -> jax.Array:
    """What handlers take for the rows that they compute: [R] bool, or an empty array for all rows."""
    return jnp.zeros((0,), bool) if is_used is None else is_used


def limit_threads(count: int) -> None:
    """Lets the ops of every library that is loaded use at most so many threads."""
    for library in _loaded:
        library.set_max_threads(count)
