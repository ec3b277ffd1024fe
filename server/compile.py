"""`quire compile`: every program of an engine lowered and compiled for chips that need not be here, and what that says about them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from quire.backends.chips import all_chips, chips
from quire.backends.environment import neuron_cache, neuron_flags
from quire.backends.neuron import NeuronBackend
from quire.backends.neuron_compiler import COMPILER, NeuronCompiler, with_defaults
from quire.backends.tpu import TpuBackend
from quire.engine import compile_report, neuron_report
from quire.engine.arguments import add_engine_flags, engine_arguments
from quire.engine.compile_report import CompiledProgram, CompileReport, PlannedEngine
from quire.engine.config import EngineConfig
from quire.engine.neuron_report import NeuronProgram, NeuronReport
from quire.engine.planning import EnginePlan
from quire.engine.programs import ProgramSource, build_all
from quire.kernels.errors import BackendError

GIB = 2**30
Examined = TypeVar("Examined")


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "compile",
        help="compile for chips that are not here, and see what fits",
        description=(
            "Compile every step of a model for chips that need not be here, without weights: for a TPU topology with the real compiler "
            "(libtpu), on any Linux machine; for NeuronCores every step is lowered, held against the rules of the hardware, and "
            "compiled where neuronx-cc is installed. Prints what a device's memory holds, and exits with 1 where something does not "
            "fit, breaks a rule or does not compile."
        ),
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="Hugging Face id, folder, demo or demo-draft")
    parser.add_argument("--model", dest="model_flag", metavar="MODEL", help="the same, as a flag")
    parser.add_argument(
        "--target",
        required=True,
        help="chips to compile for: v5e:2x4, v6e:1x1, v5p:2x2x1, ...; inf2, trn1:32, trn2, ...",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="write report.json and the programs there")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Compiles, prints, writes; 1 where a program does not compile or breaks a rule."""
    arguments = engine_arguments(namespace)
    arguments["model"] = namespace.model or namespace.model_flag or "demo"
    name = namespace.target.partition(":")[0]
    if name not in all_chips():
        raise BackendError(
            f"target {namespace.target!r} names no chip that quire knows: TPUs, as v5e:2x4, are {', '.join(chips())}; "
            f"NeuronCores, as inf2 or trn1:32, are {', '.join(chips('neuron'))}"
        )
    backend: TpuBackend | NeuronBackend
    if name in chips("neuron"):
        backend = NeuronBackend.described(namespace.target, arguments.get("neuron_logical_cores"))
    else:
        backend = TpuBackend(namespace.target)
    arguments.setdefault("tensor_parallel_size", backend.num_devices)
    plan = EnginePlan.make(EngineConfig.from_arguments(**arguments), backend)
    if namespace.output is not None:
        namespace.output.mkdir(parents=True, exist_ok=True)
    report: CompileReport | NeuronReport
    if isinstance(backend, NeuronBackend):
        report = compile_for_neuron(plan, backend, namespace.target, namespace.output)
        text = describe_neuron(report)
    else:
        report = compile_plan(plan, namespace.target, namespace.output)
        text = describe(report)
    print(json.dumps(report.to_json()) if namespace.json else text)
    if namespace.output is not None:
        (namespace.output / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    return 1 if report.failures else 0


def compile_plan(plan: EnginePlan, target: str, output: Path | None) -> CompileReport:
    """Compiles every program of the plan, several at once, telling on standard error how far it is."""
    programs, seconds = _build(plan, target, partial(compile_report.examine, plan=plan, folder=output))
    return CompileReport.of(plan, target, programs, seconds)


def compile_for_neuron(plan: EnginePlan, backend: NeuronBackend, target: str, output: Path | None) -> NeuronReport:
    """Lowers and checks every program of the plan, and compiles it where neuronx-cc is installed."""
    compiler = None
    if NeuronCompiler.is_installed():
        flags = tuple(with_defaults(neuron_flags()))
        compiler = NeuronCompiler(backend.chip.name, backend.chip.cores_per_device, flags, neuron_cache())
    else:
        print(f"{COMPILER} is not on the path: programs are lowered and checked, and not compiled", file=sys.stderr)
    examine = partial(
        neuron_report.examine, plan=plan, compiler=compiler, generation=backend.chip.generation, folder=output
    )
    programs, seconds = _build(plan, target, examine)
    planned = vars(PlannedEngine.of_plan(plan, target))
    return NeuronReport(**planned, seconds=seconds, is_compiled=compiler is not None, programs=tuple(programs))


def _build(plan: EnginePlan, target: str, examine: Callable[[ProgramSource], Examined]) -> tuple[list[Examined], float]:
    """What `examine` says of every program, and the seconds it took."""
    sources = plan.sources()
    begin = time.perf_counter()

    def progress(done: int, total: int, what: str) -> None:
        print(f"[{done}/{total}] {what} ({time.perf_counter() - begin:.0f} s)", file=sys.stderr, flush=True)

    print(f"compiling {len(sources)} programs for {target}", file=sys.stderr, flush=True)
    return build_all(plan.backend, sources, examine, progress), time.perf_counter() - begin


def describe(report: CompileReport) -> str:
    """The report for people: a line per program, then what memory holds."""
    header = ("program", "compile s", "temp MiB", "peak GiB", "collectives", "cache copies")
    lines = _table([header, *(_row(program) for program in report.programs)])
    room = report.hbm_bytes - report.weight_bytes - report.temp_bytes
    compiled = f"{len(report.programs)} programs in {report.seconds:.0f} s, {report.compile_seconds:.0f} s of compiling"
    return "\n".join(
        [
            *lines,
            "",
            *_memory_lines(
                report,
                f"{report.temp_bytes / GIB:8.2f} GiB at most, {report.planned_temp_bytes / GIB:.2f} GiB planned for",
                room,
            ),
            f"  compiled      {compiled}",
            *(f"FAILED {program.name}: {program.error}" for program in report.failures),
        ]
    )


def describe_neuron(report: NeuronReport) -> str:
    """The same for NeuronCores, of which only their compiler could say what a program takes."""
    header = ("program", "seconds", "instructions", "collectives", "rules broken", "NEFF MiB")
    lines = _table([header, *(_neuron_row(program) for program in report.programs)])
    room = report.hbm_bytes - report.weight_bytes - report.planned_temp_bytes
    compiled = f"{len(report.programs)} programs in {report.seconds:.0f} s"
    warnings = sorted({warning for program in report.programs for warning in program.warnings})
    return "\n".join(
        [
            *lines,
            "",
            *_memory_lines(report, f"{report.planned_temp_bytes / GIB:8.2f} GiB planned for", room),
            f"  {'compiled' if report.is_compiled else 'lowered'}      {compiled}; instructions are estimates",
            *warnings,
            *(f"in {program.name}: {error}" for program in report.programs for error in program.errors),
            *(f"FAILED {program.name}: {program.error}" for program in report.programs if program.error is not None),
        ]
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _row(program: CompiledProgram) -> tuple[str, ...]:
    if program.error is not None:
        return (program.name, f"{program.seconds:.1f}", "-", "-", "-", "FAILED")
    return (
        program.name,
        f"{program.seconds:.1f}",
        f"{program.temp_bytes / 2**20:.1f}",
        f"{program.peak_bytes / GIB:.2f}",
        _counts(program.collectives),
        str(program.cache_copies),
    )


def _neuron_row(program: NeuronProgram) -> tuple[str, ...]:
    if program.error is not None:
        size = "FAILED"
    else:
        size = "-" if program.neff_bytes is None else f"{program.neff_bytes / 2**20:.1f}"
    return (
        program.name,
        f"{program.seconds:.1f}",
        f"{program.instructions:,}",
        _counts(program.collectives),
        str(len(program.errors)),
        size,
    )


def _counts(collectives: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in collectives.items()) or "none"


def _memory_lines(report: PlannedEngine, temporaries: str, room: int) -> list[str]:
    return [
        f"{report.model} on {report.target}, {report.num_devices} device(s) of {report.hbm_bytes / GIB:.2f} GiB, {report.dtype}",
        f"  weights       {report.weight_bytes / GIB:8.2f} GiB a device",
        f"  KV cache      {report.cache_bytes / GIB:8.2f} GiB a device: {report.num_kv_blocks} blocks of {report.block_size} tokens, "
        f"{(report.num_kv_blocks - 1) * report.block_size:,} tokens",
        f"  temporaries   {temporaries}",
        f"  free          {(room - report.cache_bytes) / GIB:8.2f} GiB; up to {max(room // report.block_bytes, 0):,} blocks would fit",
        f"  kernels       {', '.join(f'{op} {name}' for op, name in report.kernels.items())}",
    ]
