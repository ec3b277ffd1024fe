"""NeuronCores of Inferentia2 and Trainium: this host's, through jax's plugin; a CPU behaving like them; or described ones to compile for.

None of it has run on a device yet.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from quire.backends.base import Capabilities, Program, ShapeLimits, StepShape
from quire.backends.chips import Chip, chip_of_kind, chips
from quire.backends.environment import (
    available_memory,
    available_processors,
    neuron_cache,
    neuron_flags,
    neuron_logical_cores,
    neuron_target,
    prepare_neuron,
    set_neuron_flags,
)
from quire.backends.memory import DeviceMemory, JaxMemory
from quire.backends.neff import NeffRuntime
from quire.backends.neuron_compiler import NeuronCompiler, compile_slots, retried, with_defaults
from quire.backends.shapes import decode_row_sizes, with_drafts, with_sampling
from quire.kernels.errors import BackendError
from quire.kernels.nki import official_nki
from quire.kernels.op import OpContext
from quire.kernels.ops import PAGED_ATTENTION, REFERENCE, WRITE_KV, Ops, choose_ops
from quire.kernels.paged_attention import nki
from quire.kernels.paged_attention.nki_self_test import self_test
from quire.models.config import ModelConfig
from quire.models.parallel import model_mesh

logger = logging.getLogger(__name__)

RUNTIMES = ("auto", "pjrt", "neff")
"""Who runs programs: jax's plugin, or torch-neuronx what neuronx-cc made of them; auto is the plugin where it is installed."""
TILE_SIZE = 128  # tokens on the partitions of a NeuronCore
FEWEST_ROWS = 4
ROW_FACTOR = 8
# Attention gathers all that a row could have, so a second, shorter context is compiled; each one more costs minutes.
SHORT_CONTEXT_SHARE = 4
MIN_SHORT_CONTEXT = 512


@dataclass(frozen=True)
class NeuronOptions:
    """What a user can say of NeuronCores, beside how many."""

    emulate: str | None = None
    """A chip that the CPU is to behave like."""
    runtime: str = "auto"
    """One of RUNTIMES."""
    logical_cores: int | None = None
    """Physical cores that make one device, 1 or 2; None is the chip's own default."""


class NeuronBackend:
    """NeuronCores as jax counts them, logical ones."""

    def __init__(
        self,
        chip: Chip,
        devices: Sequence[Any] | int,
        *,
        is_emulated: bool = False,
        runtime: NeffRuntime | None = None,
    ) -> None:
        """`devices` that are a number are none of jax's: they are the runtime's, or not here, and can be compiled for and nothing else."""
        self.chip = chip
        self._devices = None if isinstance(devices, int) else list(devices)
        self.num_devices = devices if isinstance(devices, int) else len(devices)
        self._is_emulated = is_emulated
        self._runtime = runtime
        self._flags = tuple(neuron_flags())
        self._retrying = threading.Lock()
        self.memory: DeviceMemory = JaxMemory() if runtime is None else runtime
        self.capabilities = Capabilities(
            platform="neuron",
            device_kind=chip.device_kinds[0] if chip.device_kinds else chip.name,
            # A step of both would be one more program for each pair of sizes, each of which takes minutes to compile.
            mixed_batches=False,
            dtypes=("bfloat16", "float32"),
            default_dtype="bfloat16",
            # A token's keys and values are a row of DMA, and a block is what XLA's path gathers at once.
            block_size=32,
            block_size_multiple=1,
            tile_size=TILE_SIZE,
            scan_layers=True,
            cache_bits_dtype={},
            max_num_seqs=32,
            default_max_model_len=4096,
            max_prefill_tokens=512,
            # Programs and the runtime's own buffers lie in the same memory; how much they take is not documented.
            memory_utilization=0.85,
            max_compile_threads=compile_slots(available_memory(), available_processors()),
            holds_head_apart=True,
            num_draft_counts=2,
            keeps_compiled=not is_emulated,
        )

    @classmethod
    def attached(cls, options: NeuronOptions, num_cores: int) -> NeuronBackend:
        """The NeuronCores of this host, of which `num_cores` are taken.

        Raises BackendError where there are none, or jax's plugin for them is not installed.
        """
        prepare_neuron(num_cores, options.logical_cores)
        if _chosen_runtime(options.runtime) == "neff":
            return cls._through_torch(options, num_cores)
        # jax's default generator is not supported there, and nothing that a step computes hangs on it.
        jax.config.update("jax_default_prng_impl", "rbg")
        set_neuron_flags(with_defaults(neuron_flags()))
        try:
            devices = jax.devices("neuron")
        except RuntimeError as error:
            raise BackendError(
                f"jax finds no NeuronCores ({error}); install AWS's jax-neuronx for this jax {jax.__version__}, and see with "
                "neuron-ls that no other process holds them"
            ) from error
        if jax.process_count() > 1:
            raise BackendError(
                f"these NeuronCores belong to {jax.process_count()} processes, and quire runs on those of one host so far"
            )
        return cls(_chip_of(devices[0].device_kind), devices)

    @classmethod
    def _through_torch(cls, options: NeuronOptions, num_cores: int) -> NeuronBackend:
        """jax lowers for cores that it does not know of, and torch-neuronx runs what neuronx-cc made."""
        target = neuron_target()
        if target not in chips("neuron"):
            raise BackendError(
                f"what this host's chips are cannot be told ({target}); set NEURON_PLATFORM_TARGET_OVERRIDE to one of "
                f"{', '.join(chips('neuron'))}"
            )
        jax.config.update("jax_platforms", "cpu")
        chip = _named_chip(target, options.logical_cores or neuron_logical_cores())
        flags = tuple(with_defaults(neuron_flags()))
        compiler = NeuronCompiler(target, chip.cores_per_device, flags, neuron_cache())
        return cls(chip, num_cores, runtime=NeffRuntime(num_cores, compiler))

    @classmethod
    def emulated(cls, options: NeuronOptions) -> NeuronBackend:
        """This host's CPU with what is decided for a chip: its step shapes, limits, kernels and XLA path."""
        assert options.emulate is not None
        chip = _named_chip(options.emulate, options.logical_cores)
        return cls(chip, jax.devices("cpu"), is_emulated=True)

    @classmethod
    def described(cls, target: str, logical_cores: int | None = None) -> NeuronBackend:
        """Cores that are not here, to compile for: those of a chip, or so many, as inf2:8 is. Raises BackendError for anything else."""
        match = re.fullmatch(r"(\w+)(?::([1-9]\d*))?", target)
        if match is None or match[1] not in chips("neuron"):
            raise BackendError(
                f"target {target!r} is not of the form CHIP or CHIP:DEVICES, as inf2 or trn1:32 is; chips: "
                f"{', '.join(chips('neuron'))}"
            )
        # Nothing runs on them, so whatever jax computes while it traces is the CPU's.
        jax.config.update("jax_platforms", "cpu")
        chip = _named_chip(match[1], logical_cores)
        return cls(chip, int(match[2]) if match[2] else chip.devices_per_chip)

    def make_mesh(self, tensor_parallel_size: int) -> jax.sharding.Mesh:
        if tensor_parallel_size > self.num_devices:
            hint = (
                f"; try it out with XLA_FLAGS=--xla_force_host_platform_device_count={tensor_parallel_size} in the environment"
                if self._is_emulated
                else ""
            )
            raise BackendError(
                f"tensor_parallel_size={tensor_parallel_size} is more than the {self.num_devices} devices there are{hint}"
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
        if self._devices is not None and not self._is_emulated:
            context = dataclasses.replace(context, nki_self_test=_test_kernels(context, wanted or {}))
        return choose_ops(context, wanted)

    def kv_cache_bytes(self, memory_utilization: float, reserved_bytes: int) -> int:
        return int((self._free_bytes() - reserved_bytes) * memory_utilization)

    def _free_bytes(self) -> int:
        if self._runtime is not None:
            return self.chip.hbm_bytes - self._runtime.held_bytes
        if self._devices is None:
            return self.chip.hbm_bytes
        if self._is_emulated:
            # All emulated devices share the host's memory.
            return min(self.chip.hbm_bytes - _held_bytes(self._devices[0]), available_memory() // self.num_devices)
        readings: list[dict[str, int]] = [device.memory_stats() or {} for device in self._devices]
        if all({"bytes_limit", "bytes_in_use"} <= stats.keys() for stats in readings):
            return min(stats["bytes_limit"] - stats["bytes_in_use"] for stats in readings)
        # The plugin is not known to tell; then it is the chip's memory without what this process holds of it.
        return self.chip.hbm_bytes - max(map(_held_bytes, self._devices))

    def step_shapes(self, limits: ShapeLimits) -> Sequence[StepShape]:
        full = -(-limits.max_model_len // limits.block_size)
        short = max(full // SHORT_CONTEXT_SHARE, -(-MIN_SHORT_CONTEXT // limits.block_size))
        contexts = (short, full) if 2 * short <= full else (full,)
        rows = decode_row_sizes(limits.max_num_seqs, FEWEST_ROWS, ROW_FACTOR)
        steps = sorted({1, limits.decode_steps_per_dispatch})
        decode = [StepShape(r, 0, TILE_SIZE, c, n) for r in rows for c in contexts for n in steps]
        tiles = sorted({1, limits.max_prefill_tiles})
        prefill = [StepShape(0, p, TILE_SIZE, full) for p in tiles]
        return with_drafts(with_sampling(decode, prefill, limits), limits)

    def lower(self, program: Program, arguments: Sequence[Any], donate: Sequence[int]) -> Any:
        # Parameters are bound by their number, so none may be left out.
        jitted = jax.jit(program, donate_argnums=tuple(donate), keep_unused=self._runtime is not None)
        if self._is_emulated:
            return jitted.lower(*arguments)
        return jitted.trace(*arguments).lower(lowering_platforms=("neuron",))

    def compile(self, lowered: Any) -> Program:
        if self._runtime is not None:
            return self._runtime.load(lowered)
        if self._devices is None:
            raise BackendError(f"no {self.chip.name} is here to load programs into; `quire compile` compiles for one")
        if self._is_emulated:
            emulated: Program = lowered.compile()
            return emulated
        try:
            compiled: Program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            logger.warning("the Neuron compiler fails; trying once more with less optimization: %s", error)
            # The plugin reads them when it compiles, so a program that another thread compiles meanwhile may get them too: that costs it
            # optimization, and is told apart in the cache.
            with self._retrying:
                set_neuron_flags(retried(self._flags))
                try:
                    compiled = lowered.compile()
                finally:
                    set_neuron_flags(self._flags)
        return compiled

    def profile(self, folder: Path) -> AbstractContextManager[Any]:
        return jax.profiler.trace(str(folder))


def why_no_runtime() -> str | None:
    """Why no program could be run on NeuronCores, None where one of the runtimes is installed."""
    missing = _missing_runtimes()
    if None in missing.values():
        return None
    reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
    return f"no runtime is installed ({reasons}); AWS's packages come from AWS's own index"


def _missing_runtimes() -> dict[str, str | None]:
    """For each runtime why it cannot be had, None where it can."""
    return {"pjrt": _why_not("libneuronxla"), "neff": _why_not("torch_neuronx")}


def _chosen_runtime(wanted: str) -> str:
    """pjrt or neff, said in the log with the reason. Raises BackendError where what is wanted, or all of it, is not installed."""
    missing = _missing_runtimes()
    names = RUNTIMES[1:] if wanted == "auto" else (wanted,)
    if wanted == "auto" and missing["pjrt"] is None and (reason := _why_plugin_is_for_others()) is not None:
        # Not more than a preference: what the plugin lists may be less than what it accepts.
        logger.info("jax's plugin for Neuron may not do: %s", reason)
        names = names[::-1]
    for name in names:
        if missing[name] is None:
            others = "; ".join(f"{other}: {reason}" for other, reason in missing.items() if reason is not None)
            logger.info("Neuron runtime: %s%s", name, f" ({others})" if others else "")
            return name
    reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
    raise BackendError(f"neuron_runtime={wanted!r} cannot be had: {reasons}; AWS's packages come from AWS's own index")


def _why_plugin_is_for_others() -> str | None:
    """Why the plugin may not take this jax, None where it lists it or lists nothing."""
    supported = getattr(importlib.import_module("libneuronxla"), "supported_clients", None)
    said, version = "" if supported is None else str(supported()), importlib.metadata.version("jaxlib")
    if not said or version in said:
        return None
    return f"it lists {said}, and jaxlib is {version}"


def _why_not(package: str) -> str | None:
    """Why a package cannot be imported, None where it can. Those of the same names on PyPI raise ImportError."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        return str(error)
    return None


def _test_kernels(context: OpContext, wanted: Mapping[str, str]) -> str | None:
    """Why the NKI kernels are not to serve a model on this device, None where they agree with XLA's path on it."""
    if official_nki()[0] is None or nki.refuses_model(context) is not None:
        return context.nki_self_test  # there is a better reason, which is given instead
    if all(wanted.get(op) == REFERENCE for op in (WRITE_KV.name, PAGED_ATTENTION.name)):
        return "XLA's path was asked for"
    reason = self_test(context, TILE_SIZE)
    if reason is None:
        logger.info("the NKI kernels agree with XLA's path on this device")
    else:
        logger.warning("XLA's path serves instead of the NKI kernels: %s", reason)
    return reason


def _held_bytes(device: Any) -> int:
    """Bytes of a device's memory that this process's arrays take."""
    return sum(
        shard.data.nbytes
        for array in device.client.live_arrays()
        if device in array.devices()
        for shard in array.addressable_shards
        if shard.device == device
    )


def _chip_of(device_kind: str) -> Chip:
    """The chip behind what the plugin calls a device, by this host's instance type where kinds are the same."""
    target = neuron_target()
    if target in chips("neuron"):
        return _named_chip(target, neuron_logical_cores())
    found = chip_of_kind(device_kind)
    if found is None:
        version = re.search(r"v(\d)", device_kind)
        found = next(
            (chip for chip in chips("neuron").values() if version and chip.generation == f"v{version[1]}"), None
        )
    if found is None:
        raise BackendError(
            f"{device_kind!r} is a NeuronCore that quire does not know; set NEURON_PLATFORM_TARGET_OVERRIDE to one of "
            f"{', '.join(chips('neuron'))}"
        )
    return _with_logical_cores(found, neuron_logical_cores())


def _named_chip(name: str, logical_cores: int | None) -> Chip:
    return _with_logical_cores(chips("neuron")[name], logical_cores)


def _with_logical_cores(chip: Chip, logical_cores: int | None) -> Chip:
    """The chip with devices of so many physical cores. Raises BackendError where it has none such."""
    if logical_cores is None or logical_cores == chip.cores_per_device:
        return chip
    if chip.generation == "v2" or logical_cores not in (1, 2):
        raise BackendError(f"{chip.name} has no devices of {logical_cores} cores: leave neuron_logical_cores out")
    factor = logical_cores / chip.cores_per_device
    return dataclasses.replace(
        chip,
        hbm_gib=chip.hbm_gib * factor,
        hbm_gb_per_s=chip.hbm_gb_per_s * factor,
        bf16_tflops=chip.bf16_tflops * factor,
        cores_per_device=logical_cores,
        devices_per_chip=round(chip.devices_per_chip / factor),
    )
