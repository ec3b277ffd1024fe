"""What a backend is: the capabilities of a device, the shapes that will be compiled for it, and who compiles them.

Lowering, compiling and running are apart, since on some devices another compiler than jax's makes the program, or another
runtime runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax

from quire.backends.memory import DeviceMemory
from quire.kernels.op import OpContext
from quire.kernels.ops import Ops
from quire.kernels.sampling.rows import SamplingMode
from quire.models.config import ModelConfig
from quire.models.parallel import num_held_kv_heads


@dataclass(frozen=True)
class Capabilities:
    """What a device can do, as data. Whoever needs to know reads a field; nobody asks which device it is."""

    platform: str
    device_kind: str
    mixed_batches: bool
    """Whether decode rows and prefill tiles may share a step."""
    dtypes: tuple[str, ...]
    """Dtypes that weights and activations may have."""
    default_dtype: str | None
    """The dtype that "auto" stands for; None is the checkpoint's own."""
    block_size: int
    """The KV cache's block size unless the user gives one, in tokens."""
    block_size_multiple: int
    tile_size: int
    """Tokens in one prefill tile."""
    scan_layers: bool
    """Layers stacked and scanned with the cache in one array, or unrolled with one cache array per layer."""
    cache_bits_dtype: dict[str, str]
    """The dtype in which the cache holds the bits of another one, where that is what keeps it from being copied."""
    max_num_seqs: int
    """Default for the number of requests that run at once."""
    default_max_model_len: int
    """Longest sequence, in tokens, unless the user asks for more."""
    max_prefill_tokens: int
    """Default for the prompt tokens of one step."""
    memory_utilization: float
    """Default for the share of the memory left beside weights and steps that the KV cache may take."""
    max_compile_threads: int
    """Programs handed to the compiler at once."""
    holds_head_apart: bool = False
    """Whether a tied embedding is held a second time as the head's matrix: for devices that would transpose it in every step."""
    num_draft_counts: int = 3
    """How many different numbers of drafts are compiled, where the engine may choose among them."""
    keeps_compiled: bool = False
    """Whether its compiler keeps what it made by itself, so that jax's own cache of programs stays out of it."""
    has_host_memory: bool = False
    """Whether its memory is the host's, which reads results where they lie: to have them sent ahead would only cost time."""
    min_layout_tile: tuple[int, int] = (1, 1)
    """The device's memory pads the last two axes of an array to multiples of these, the first of them at most."""

    def padded_elements(self, shape: tuple[int, ...]) -> int:
        """How many elements the device's memory takes for an array."""
        *leading, rows, columns = shape
        row_tile, column_tile = self.min_layout_tile
        # Fewer rows than a tile has lie in a smaller one, a power of two.
        row_tile = min(row_tile, 1 << (rows - 1).bit_length())
        return math.prod(leading) * -(-rows // row_tile) * row_tile * -(-columns // column_tile) * column_tile

    def op_context(
        self,
        config: ModelConfig,
        dtype: str,
        quantization: str,
        block_size: int,
        tensor_parallel_size: int,
        *,
        instruction_sets: frozenset[str] = frozenset(),
    ) -> OpContext:
        """What decides which kernels serve a model on this device; see `Backend.select_ops` for the arguments."""
        return OpContext(
            platform=self.platform,
            device_kind=self.device_kind,
            dtype=dtype,
            quantization=quantization,
            num_heads=config.num_heads // tensor_parallel_size,
            num_kv_heads=num_held_kv_heads(config, tensor_parallel_size) // tensor_parallel_size,
            head_dim=config.head_dim,
            block_size=block_size,
            num_devices=tensor_parallel_size,
            scan_layers=self.scan_layers,
            has_experts=config.moe is not None,
            instruction_sets=instruction_sets,
        )


@dataclass(frozen=True, order=True)
class StepShape:
    """Everything static about one compiled step. A batch runs in the cheapest shape that covers it."""

    decode_rows: int
    prefill_tiles: int
    tile_size: int
    context_blocks: int
    """Blocks of a row that attention can reach."""
    num_decode_steps: int = 1
    """Rounds of a speculative step: each drafts, verifies and accepts."""
    sampling: SamplingMode = SamplingMode.GREEDY
    prompt_logprobs: bool = False
    num_drafts: int = 0
    """Tokens drafted for each decode row, and verified beside its newest one."""
    is_catch_up: bool = False
    """Whether its tiles are tokens that the draft model has not seen yet; the target computes nothing then."""

    @property
    def decode_width(self) -> int:
        """Tokens of a decode row: its newest and its drafts."""
        return 1 + self.num_drafts

    @property
    def num_tokens(self) -> int:
        """Tokens that the dense layers see per pass."""
        return self.decode_rows * self.decode_width + self.prefill_tiles * self.tile_size

    @property
    def num_logit_rows(self) -> int:
        """Rows whose next token is sampled."""
        return 0 if self.is_catch_up else self.decode_rows * self.decode_width + self.prefill_tiles

    def covers(self, need: StepShape) -> bool:
        """Whether a batch that needs at least `need` can run in this shape."""
        return (
            self.decode_rows >= need.decode_rows
            and self.prefill_tiles >= need.prefill_tiles
            and self.context_blocks >= need.context_blocks
            and self.num_decode_steps == need.num_decode_steps
            and self.sampling >= need.sampling
            and self.prompt_logprobs >= need.prompt_logprobs
            and self.num_drafts >= need.num_drafts
            and self.is_catch_up == need.is_catch_up
        )

    def describe(self) -> str:
        """Short form for logs: `decode 32 + prefill 8x32, context 64 blocks, random`."""
        parts = []
        if self.decode_rows:
            steps = f" x{self.num_decode_steps} steps" if self.num_decode_steps > 1 else ""
            drafts = f" of {self.num_drafts} drafts" if self.num_drafts else ""
            parts.append(f"decode {self.decode_rows}{steps}{drafts}")
        if self.prefill_tiles:
            kind = "draft prefill" if self.is_catch_up else "prefill"
            parts.append(f"{kind} {self.prefill_tiles}x{self.tile_size}")
        where = f"{' + '.join(parts)}, context {self.context_blocks} blocks"
        if self.is_catch_up:
            return where
        return f"{where}, {self.sampling.name.lower()}{', prompt logprobs' if self.prompt_logprobs else ''}"


@dataclass(frozen=True)
class ShapeLimits:
    """What the compiled shapes must be able to hold."""

    max_num_seqs: int
    max_prefill_tiles: int
    max_model_len: int
    block_size: int
    decode_steps_per_dispatch: int
    is_padding_free: bool = False
    """Whether a step costs what is in it and not what its shape could hold, so that fewer shapes do."""
    is_random_free: bool = False
    """Whether sampling a greedy row costs no more where random ones may stand beside it, so that greedy needs no program of its own."""
    most_sampling: SamplingMode = SamplingMode.FULL
    """The most that requests may ask of the sampler."""
    draft_counts: tuple[int, ...] = ()
    """How many tokens a speculative step may draft for each row, ascending; none without speculation."""
    has_draft_cache: bool = False
    """Whether there is a draft model with a cache of its own, which has to catch up with the target's."""


Program = Callable[..., Any]
"""A pure function of arrays; what it changes is donated to it and returned."""


class Backend(Protocol):
    """A device and its compiler. Features become a field of `Capabilities` or an op, not a method here."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def memory(self) -> DeviceMemory:
        """Where arrays are put that programs are called with."""
        ...

    def make_mesh(self, tensor_parallel_size: int) -> jax.sharding.Mesh:
        """The devices that one model is spread over. Raises BackendError when there are too few."""
        ...

    def select_ops(
        self,
        config: ModelConfig,
        dtype: str,
        quantization: str,
        block_size: int,
        tensor_parallel_size: int,
        wanted: dict[str, str] | None,
    ) -> Ops:
        """The kernels that serve this model; see `quire.kernels.ops.choose_ops`."""
        ...

    def kv_cache_bytes(self, memory_utilization: float, reserved_bytes: int) -> int:
        """Bytes of one device that the KV cache may take: that share of what is free now, less what others will still use.

        Negative where not even those fit.
        """
        ...

    def step_shapes(self, limits: ShapeLimits) -> Sequence[StepShape]:
        """Every shape that will ever be compiled; some shape covers any batch within `limits`."""
        ...

    def lower(self, program: Program, arguments: Sequence[Any], donate: Sequence[int]) -> Any:
        """Traces `program` for abstract `arguments` into the compiler's input; `donate` are the indices given up."""
        ...

    def compile(self, lowered: Any) -> Program:
        """Turns what `lower` gave into something callable with real arguments."""
        ...

    def profile(self, folder: Path) -> AbstractContextManager[Any]:
        """Records what the device does within the context, for the profiler's viewer, into `folder`."""
        ...


class WrappedBackend:
    """Another backend, and whatever a subclass does in its own way."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner

    @property
    def capabilities(self) -> Capabilities:
        return self._inner.capabilities

    @property
    def memory(self) -> DeviceMemory:
        return self._inner.memory

    def make_mesh(self, tensor_parallel_size: int) -> jax.sharding.Mesh:
        return self._inner.make_mesh(tensor_parallel_size)

    def select_ops(
        self,
        config: ModelConfig,
        dtype: str,
        quantization: str,
        block_size: int,
        tensor_parallel_size: int,
        wanted: dict[str, str] | None,
    ) -> Ops:
        return self._inner.select_ops(config, dtype, quantization, block_size, tensor_parallel_size, wanted)

    def kv_cache_bytes(self, memory_utilization: float, reserved_bytes: int) -> int:
        return self._inner.kv_cache_bytes(memory_utilization, reserved_bytes)

    def step_shapes(self, limits: ShapeLimits) -> Sequence[StepShape]:
        return self._inner.step_shapes(limits)

    def lower(self, program: Program, arguments: Sequence[Any], donate: Sequence[int]) -> Any:
        return self._inner.lower(program, arguments, donate)

    def compile(self, lowered: Any) -> Program:
        return self._inner.compile(lowered)

    def profile(self, folder: Path) -> AbstractContextManager[Any]:
        return self._inner.profile(folder)
