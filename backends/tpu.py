"""TPUs: the chips of this host through jax, or a described topology of them, for which programs are compiled on a machine that has none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from quire.backends.base import Capabilities, Program, ShapeLimits, StepShape
from quire.backends.chips import Chip, chip_of_kind, chips
from quire.backends.environment import prepare_tpu_compiler
from quire.backends.memory import JaxMemory
from quire.backends.shapes import decode_row_sizes, with_drafts, with_sampling
from quire.kernels.errors import BackendError
from quire.kernels.ops import Ops, choose_ops
from quire.models.config import ModelConfig
from quire.models.parallel import model_mesh

# Eight rows cost what one costs: they are one register of the vector unit, and one pass of the matrix unit.
FEWEST_ROWS = 8
ROW_FACTOR = 4
TILE_SIZE = 128
FEW_TILES = 2


# A step's gathers, scatters and sorts are of a few rows. Given to the sparse cores that v6e has, they made the compiler's stack
# overflow in two of three runs over all shapes of an 8B model.
COMPILER_OPTIONS = {
    "xla_tpu_enable_offloading_gather_to_sparsecore": "false",
    "xla_tpu_enable_offloading_scatter_to_sparsecore": "false",
    "xla_tpu_enable_offloading_sort_to_sparsecore": "false",
}


class TpuBackend:
    """TPU chips as jax counts them. `target` names a topology to compile for, such as v5e:2x4; None is the chips of this host."""

    def __init__(self, target: str | None = None, *, only_planned: tuple[Chip, int] | None = None) -> None:
        """`only_planned` are so many chips that nothing is compiled for, which needs no compiler either.

        Raises BackendError where there are no TPUs, or no compiler for the target.
        """
        self._is_described = target is not None or only_planned is not None
        self._devices: list[Any] | None = None
        if only_planned is not None:
            self.chip, self.num_devices = only_planned
            kind = self.chip.device_kinds[0]
        else:
            self._devices = _attached_devices() if target is None else _described_devices(target)
            self.num_devices = len(self._devices)
            kind = self._devices[0].device_kind
            found = chip_of_kind(kind)
            if found is None:
                raise BackendError(f"{kind!r} is a TPU that quire does not know; backends/chips.json has those it does")
            self.chip = found
        self.memory = JaxMemory()
        self.capabilities = Capabilities(
            platform="tpu",
            device_kind=kind,
            mixed_batches=True,
            dtypes=("bfloat16", "float32"),
            default_dtype="bfloat16",
            block_size=64,
            block_size_multiple=16,
            tile_size=TILE_SIZE,
            scan_layers=True,
            cache_bits_dtype={},
            max_num_seqs=64,
            default_max_model_len=8192,
            max_prefill_tokens=1024,
            memory_utilization=0.95,
            max_compile_threads=4,
            min_layout_tile=(8, 128),
        )

    def make_mesh(self, tensor_parallel_size: int) -> jax.sharding.Mesh:
        if tensor_parallel_size > self.num_devices:
            raise BackendError(
                f"tensor_parallel_size={tensor_parallel_size} is more than the {self.num_devices} TPU devices there are"
            )
        return model_mesh(self._devices, tensor_parallel_size)

    def select_ops(
        self,
        config: ModelConfig,
        dtype: str,
        quantization: str,
        block_size: int,
        tensor_parallel_size: int,
        wanted: dict[str, str] | None,
    ) -> Ops:
        context = self.capabilities.op_context(config, dtype, quantization, block_size, tensor_parallel_size)
        return choose_ops(context, wanted)

    def kv_cache_bytes(self, memory_utilization: float, reserved_bytes: int) -> int:
        return int((self._free_bytes() - reserved_bytes) * memory_utilization)

    def _free_bytes(self) -> int:
        if self._is_described or self._devices is None:
            return self.chip.hbm_bytes
        readings: list[dict[str, int]] = [device.memory_stats() for device in self._devices]
        return min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in readings)

    def step_shapes(self, limits: ShapeLimits) -> Sequence[StepShape]:
        # One context: the kernels read the blocks that a row has, whatever its table could hold.
        context = -(-limits.max_model_len // limits.block_size)
        rows = decode_row_sizes(limits.max_num_seqs, FEWEST_ROWS, ROW_FACTOR)
        steps = sorted({1, limits.decode_steps_per_dispatch})
        decode = [StepShape(r, 0, TILE_SIZE, context, n) for r in rows for n in steps]
        tiles = sorted({min(FEW_TILES, limits.max_prefill_tiles), limits.max_prefill_tiles})
        mixed = [StepShape(rows[-1], p, TILE_SIZE, context) for p in tiles]
        return with_drafts(with_sampling(decode, mixed, limits), limits)

    def lower(self, program: Program, arguments: Sequence[Any], donate: Sequence[int]) -> Any:
        with self._kernel_target():
            traced = jax.jit(program, donate_argnums=tuple(donate)).trace(*arguments)
            return traced.lower(lowering_platforms=("tpu",))

    def _kernel_target(self) -> AbstractContextManager[Any]:
        """Tells Pallas which chip it writes kernels for, where that is not the chip that the process runs on.

        Under a shard_map it reads that from the mesh; a program for one device has none.
        """
        if not self._is_described or self._devices is None:
            return nullcontext()
        sharding: Any = jax.sharding  # the oldest jax that quire runs on lacks both names
        kind = sharding.AbstractDevice(self.capabilities.device_kind, self._devices[0].num_cores, "tpu")
        context: AbstractContextManager[Any] = sharding.use_abstract_mesh(
            sharding.AbstractMesh((), (), abstract_device=kind)
        )
        return context

    def compile(self, lowered: Any) -> Program:
        compiled: Program = lowered.compile(compiler_options=COMPILER_OPTIONS)
        return compiled

    def profile(self, folder: Path) -> AbstractContextManager[Any]:
        return jax.profiler.trace(str(folder))


def _attached_devices() -> list[Any]:
    try:
        devices = list(jax.devices("tpu"))
        if jax.process_count() > 1:
            raise BackendError(
                f"these TPU chips belong to {jax.process_count()} hosts, and quire runs on the chips of one so far: take a slice "
                "of a single host (v5e and v6e up to 2x4)"
            )
        return devices
    except RuntimeError as error:
        raise BackendError(
            f"jax finds no TPU ({error}); on a TPU VM install 'quire[tpu]', and see that no other process holds the chips"
        ) from error


# What libtpu wants to hear beside the name: these chips lie in three dimensions.
_THREE_DIMENSIONAL = ("v4", "v5p", "tpu7x")


def _described_devices(target: str) -> list[Any]:
    """The devices of a topology such as v5e:2x4, without any of them being here."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", target)
    if match is None or match[1] not in chips():
        raise BackendError(
            f"target {target!r} is not of the form CHIP:AxB, as v5e:2x4 or v4:2x2x1 is; chips: {', '.join(chips())}"
        )
    if not hasattr(jax.sharding, "AbstractDevice"):
        raise BackendError(
            f"compiling for chips that are not here needs a newer jax than {jax.__version__}; pip install -U jax"
        )
    prepare_tpu_compiler()
    # Nothing runs on chips here, so whatever jax computes while it traces is the CPU's.
    jax.config.update("jax_platforms", "cpu")
    chip, sizes = match[1], [int(size) for size in match[2].split("x")]
    options: dict[str, Any] = {}
    if np.prod(sizes) == 1:
        sizes = [1, 1, 1] if chip in _THREE_DIMENSIONAL else [1, 1]
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{chip}:{'x'.join(map(str, sizes))}"
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # libtpu and its absence raise whatever they like
        raise BackendError(
            f"no TPU compiler for {target}: {error}; it is in libtpu, which 'quire[tpu]' installs on Linux, and takes "
            "v5e and v6e as 1x1, 1x2, 2x2, 2x4, 4x4, and v4, v5p and tpu7x as 1x1x1 or 2x2x1"
        ) from error
    return list(topology.devices)
