"""What lowering an engine's programs for NeuronCores tells, and what neuronx-cc says of them where it is installed."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from quire.backends.neuron_compiler import NeuronCompiler
from quire.backends.rank_program import rank_program
from quire.backends.stablehlo_lint import Finding, lint
from quire.engine.compile_report import PlannedEngine, file_name, shortened
from quire.engine.planning import EnginePlan
from quire.engine.programs import ProgramSource
from quire.kernels.errors import BackendError

_COLLECTIVE = re.compile(r"\bstablehlo\.(all_reduce|all_gather|reduce_scatter|all_to_all|collective_permute)\b")


@dataclass(frozen=True)
class NeuronProgram:
    """One program, lowered and looked through. `error` is the compiler's, None where it was not asked or had none."""

    name: str
    seconds: float
    """Of lowering and, where it was compiled, compiling."""
    errors: tuple[str, ...]
    """What the linter forbids, each with the line it comes from."""
    warnings: tuple[str, ...]
    instructions: int
    """As estimated; see `quire.backends.neuron_instructions`."""
    collectives: dict[str, int] = field(default_factory=dict)
    """In the program's text: one inside a loop over layers is counted once."""
    neff_bytes: int | None = None
    error: str | None = None

    @property
    def is_good(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.errors and self.error is None


@dataclass(frozen=True)
class NeuronReport(PlannedEngine):
    """An engine's programs for one target; bytes are of one device."""

    seconds: float
    is_compiled: bool
    """Whether neuronx-cc was there to compile them."""
    programs: tuple[NeuronProgram, ...]

    @property
    def failures(self) -> list[NeuronProgram]:
        """Programs that break a rule or did not compile."""
        return [program for program in self.programs if not program.is_good]


def examine(
    source: ProgramSource, plan: EnginePlan, compiler: NeuronCompiler | None, generation: str, folder: Path | None
) -> NeuronProgram:
    """Lowers one program, looks for what NeuronCores lack, and compiles it if there is a compiler.

    With a folder, writes there what was lowered, as StableHLO and as the HLO that neuronx-cc takes, and what was compiled.
    """
    begin = time.perf_counter()
    name = source.describe()
    lowered = source.lower(plan.backend)
    found = lint(lowered, generation=generation)
    program = rank_program(lowered)
    neff, error = None, None
    if compiler is not None:
        try:
            neff = compiler.compile(program, name)
        except BackendError as failure:
            error = shortened(str(failure))
    if folder is not None:
        stem = file_name(name)
        (folder / f"{stem}.stablehlo.mlir").write_text(program.text, encoding="utf-8")
        (folder / f"{stem}.hlo.pb").write_bytes(program.hlo)
        if neff is not None:
            (folder / f"{stem}.neff").write_bytes(neff)
    return NeuronProgram(
        name=name,
        seconds=time.perf_counter() - begin,
        errors=tuple(map(Finding.describe, found.errors)),
        warnings=tuple(map(Finding.describe, found.warnings)),
        instructions=found.instructions,
        collectives=dict(Counter(_COLLECTIVE.findall(program.text))),
        neff_bytes=None if neff is None else len(neff),
        error=error,
    )
