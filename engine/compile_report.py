"""What compiling an engine's programs tells: memory per device, collectives, copies of the cache that should not be there."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from quire.engine.planning import EnginePlan
from quire.engine.programs import ProgramSource

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_HLO_DTYPES = {"float32": "f32", "bfloat16": "bf16", "uint16": "u16", "int8": "s8"}
_MAX_ERROR_LEN = 2000


@dataclass(frozen=True)
class CompiledProgram:
    """One program; bytes are of one device. `error` is why it could not be compiled, and then the other numbers are 0."""

    name: str
    seconds: float
    error: str | None = None
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0
    """Of the arguments, what results take the place of: the donated state."""
    temp_bytes: int = 0
    code_bytes: int = 0
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    cache_copies: int = 0
    """Instructions that copy a whole array of a KV cache, the target's or a draft model's."""

    @property
    def peak_bytes(self) -> int:
        """Arguments, results that are not in their place, temporaries and code."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes + self.code_bytes


@dataclass(frozen=True)
class PlannedEngine:
    """What an engine for one target was planned to be; bytes are of one device."""

    model: str
    target: str
    num_devices: int
    dtype: str
    kernels: dict[str, str]
    hbm_bytes: int
    weight_bytes: int
    cache_bytes: int
    planned_temp_bytes: int
    """What the cache leaves room for."""
    block_bytes: int
    block_size: int
    num_kv_blocks: int

    @classmethod
    def of_plan(cls, plan: EnginePlan, target: str) -> PlannedEngine:
        """Reads the plan."""
        resolved = plan.resolved
        return cls(
            model=plan.settings.model.model,
            target=target,
            num_devices=plan.mesh.size,
            dtype=resolved.dtype,
            kernels=plan.ops.names(),
            hbm_bytes=plan.backend.kv_cache_bytes(1.0, 0),
            weight_bytes=plan.weight_bytes,
            cache_bytes=plan.block_bytes * resolved.num_kv_blocks,
            planned_temp_bytes=plan.working_bytes,
            block_bytes=plan.block_bytes,
            block_size=resolved.block_size,
            num_kv_blocks=resolved.num_kv_blocks,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class CompileReport(PlannedEngine):
    """An engine's programs for one target; bytes are of one device."""

    temp_bytes: int
    """The most of any program."""
    seconds: float
    compile_seconds: float
    programs: tuple[CompiledProgram, ...]

    @classmethod
    def of(cls, plan: EnginePlan, target: str, programs: list[CompiledProgram], seconds: float) -> CompileReport:
        """Puts the programs beside what the plan says."""
        return cls(
            **vars(PlannedEngine.of_plan(plan, target)),
            temp_bytes=max(program.temp_bytes for program in programs),
            seconds=seconds,
            compile_seconds=sum(program.seconds for program in programs),
            programs=tuple(programs),
        )

    @property
    def failures(self) -> list[CompiledProgram]:
        """Programs that did not compile."""
        return [program for program in self.programs if program.error is not None]


def examine(source: ProgramSource, plan: EnginePlan, folder: Path | None) -> CompiledProgram:
    """Compiles one program and reads its numbers; with a folder, writes what was compiled there as StableHLO.

    What the compiler refuses is in the result, in its words.
    """
    begin = time.perf_counter()
    name = source.describe()
    try:
        lowered = source.lower(plan.backend)
        if folder is not None:
            (folder / f"{file_name(name)}.stablehlo.mlir").write_text(lowered.as_text(), encoding="utf-8")
        compiled: Any = plan.backend.compile(lowered)
    except jax.errors.JaxRuntimeError as error:
        return CompiledProgram(name, time.perf_counter() - begin, error=shortened(str(error)))
    seconds = time.perf_counter() - begin
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return CompiledProgram(
        name=name,
        seconds=seconds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        collectives=_count_collectives(text),
        cache_copies=_count_cache_copies(text, plan),
    )


def _count_collectives(text: str) -> dict[str, int]:
    """Instructions by name; one inside a loop over layers is counted once."""
    found = Counter(re.findall(rf"= \S.*? ({'|'.join(_COLLECTIVES)})(?:-start)?\(", text))
    return {name: found[name] for name in _COLLECTIVES if found[name]}


def _count_cache_copies(text: str, plan: EnginePlan) -> int:
    shapes = set()
    for part in plan.models:
        arrays = part.cache_arrays(plan.resolved.num_kv_blocks)
        local = [
            size // plan.mesh.size if axis is not None else size
            for size, axis in zip(arrays.shape, arrays.spec, strict=True)
        ]
        shapes.add(f"{_HLO_DTYPES[jnp.dtype(arrays.dtype).name]}[{','.join(map(str, local))}]")
    return len(re.findall(rf"= (?:\()?(?:{'|'.join(map(re.escape, shapes))})\S* copy(?:-start)?\(", text))


def file_name(name: str) -> str:
    """A program's name as that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def shortened(text: str) -> str:
    """A compiler's message as far as it can be read."""
    text = text.strip()
    return text if len(text) <= _MAX_ERROR_LEN else f"{text[:_MAX_ERROR_LEN]} ... ({math.ceil(len(text) / 1000)} kB)"
