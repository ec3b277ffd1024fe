"""`quire compile`: every program of an engine compiled for chips that need not be here, and what that says about memory and time."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quire.backends.tpu import TpuBackend
from quire.engine.arguments import add_engine_flags, engine_arguments
from quire.engine.compile_report import CompiledProgram, CompileReport, examine
from quire.engine.config import EngineConfig
from quire.engine.planning import EnginePlan
from quire.engine.programs import ProgramSource, build_all

GIB = 2**30


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "compile",
        help="compile for chips that are not here, and see what fits",
        description=(
            "Compile every step of a model for a TPU topology with the real compiler (libtpu), on any Linux machine and without "
            "weights. Prints what a chip's memory holds, and exits with 1 where something does not fit or does not compile."
        ),
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="Hugging Face id, folder, demo or demo-draft")
    parser.add_argument("--model", dest="model_flag", metavar="MODEL", help="the same, as a flag")
    parser.add_argument("--target", required=True, help="chips to compile for: v5e:2x4, v6e:1x1, v5p:2x2x1, ...")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="write report.json and the programs there")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Compiles, prints, writes; 1 where a program does not compile."""
    backend = TpuBackend(namespace.target)
    arguments = engine_arguments(namespace)
    arguments["model"] = namespace.model or namespace.model_flag or "demo"
    arguments.setdefault("tensor_parallel_size", backend.num_devices)
    plan = EnginePlan.make(EngineConfig.from_arguments(**arguments), backend)
    report = compile_plan(plan, namespace.target, namespace.output)
    print(json.dumps(report.to_json()) if namespace.json else describe(report))
    if namespace.output is not None:
        (namespace.output / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    return 1 if report.failures else 0


def compile_plan(plan: EnginePlan, target: str, output: Path | None) -> CompileReport:
    """Compiles every program of the plan, several at once, telling on standard error how far it is."""
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    sources = plan.sources()
    begin = time.perf_counter()

    def build(source: ProgramSource) -> CompiledProgram:
        return examine(source, plan, output)

    def progress(done: int, total: int, what: str) -> None:
        print(f"[{done}/{total}] {what} ({time.perf_counter() - begin:.0f} s)", file=sys.stderr, flush=True)

    print(f"compiling {len(sources)} programs for {target}", file=sys.stderr, flush=True)
    programs = build_all(plan.backend, sources, build, progress)
    return CompileReport.of(plan, target, programs, time.perf_counter() - begin)


def describe(report: CompileReport) -> str:
    """The report for people: a line per program, then what memory holds."""
    header = ("program", "compile s", "temp MiB", "peak GiB", "collectives", "cache copies")
    rows = [header, *(_row(program) for program in report.programs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", *_memory_lines(report), *_failure_lines(report.failures)])


def _row(program: CompiledProgram) -> tuple[str, ...]:
    if program.error is not None:
        return (program.name, f"{program.seconds:.1f}", "-", "-", "-", "FAILED")
    collectives = ", ".join(f"{count} {name}" for name, count in program.collectives.items()) or "none"
    return (
        program.name,
        f"{program.seconds:.1f}",
        f"{program.temp_bytes / 2**20:.1f}",
        f"{program.peak_bytes / GIB:.2f}",
        collectives,
        str(program.cache_copies),
    )


def _memory_lines(report: CompileReport) -> list[str]:
    room = report.hbm_bytes - report.weight_bytes - report.temp_bytes
    return [
        f"{report.model} on {report.target}, {report.num_devices} device(s) of {report.hbm_bytes / GIB:.2f} GiB, {report.dtype}",
        f"  weights       {report.weight_bytes / GIB:8.2f} GiB a device",
        f"  KV cache      {report.cache_bytes / GIB:8.2f} GiB a device: {report.num_kv_blocks} blocks of {report.block_size} tokens, "
        f"{(report.num_kv_blocks - 1) * report.block_size:,} tokens",
        f"  temporaries   {report.temp_bytes / GIB:8.2f} GiB at most, {report.planned_temp_bytes / GIB:.2f} GiB planned for",
        f"  free          {(room - report.cache_bytes) / GIB:8.2f} GiB; up to {max(room // report.block_bytes, 0):,} blocks would fit",
        f"  kernels       {', '.join(f'{op} {name}' for op, name in report.kernels.items())}",
        f"  compiled      {len(report.programs)} programs in {report.seconds:.0f} s, "
        f"{dataclasses.asdict(report)['compile_seconds']:.0f} s of compiling",
    ]


def _failure_lines(failures: Sequence[CompiledProgram]) -> list[str]:
    return [f"FAILED {program.name}: {program.error}" for program in failures]
