"""`quire bench peers`: this engine beside vLLM, OpenVINO GenAI, llama.cpp and transformers, on the same requests in the same run."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quire.bench.peers import environments
from quire.bench.peers.chart import require_matplotlib, write_chart
from quire.bench.peers.engines import (
    ENGINES,
    QUIRE,
    Contender,
    UnavailableError,
    parse_names,
    peer_contender,
    quire_contender,
)
from quire.bench.peers.report import summarize, table
from quire.bench.peers.rounds import Plan, Record, Run, say
from quire.bench.peers.shapes import SHAPES, make_checkpoint
from quire.bench.peers.workload import DEFAULT_CASES, Case
from quire.kernels.errors import InvalidConfigError


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "peers", help="this engine beside vLLM, OpenVINO GenAI, llama.cpp and transformers, in one run"
    )
    folder = environments.default_folder()
    parser.add_argument("--shape", choices=SHAPES, default="llama-135m", help="(default: %(default)s)")
    parser.add_argument("--peers", default=",".join(ENGINES), help="engines to run (default: %(default)s)")
    parser.add_argument("--cases", default=",".join(DEFAULT_CASES), help="what to measure (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="each engine once a round (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=_num_processors(), help="of each engine (default: %(default)s)")
    parser.add_argument(
        "--quire-args",
        action="append",
        metavar="'NAME=VALUE ...'",
        help="further arguments of quire's LLM; given several times, quire runs once with each",
    )
    parser.add_argument("--environments", type=Path, default=folder, metavar="FOLDER", help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="checkpoints, logs, caches (default: beside those)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also append the JSON lines to a file")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="also draw the figures")
    parser.add_argument("--read", type=Path, metavar="FILE", help="run nothing: table and chart of an earlier --output")
    parser.add_argument(
        "--install",
        type=Path,
        nargs="?",
        const=folder,
        metavar="FOLDER",
        help="run nothing: make the environments of --peers",
    )
    parser.add_argument(
        "--quiet-load",
        type=float,
        default=0.03,
        metavar="SHARE",
        help="of all processors that others may use when a measurement starts (default: %(default)s)",
    )
    parser.add_argument(
        "--quiet-limit",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="measure all the same after that (default: %(default)s; 0: do not wait)",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="kill an engine that takes longer for a start or a case (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Installs, or measures and reports; 1 where something could not be installed or nothing was measured."""
    names = parse_names(namespace.peers)
    if namespace.install is not None:
        return _install([name for name in names if name != QUIRE], namespace.install)
    _check_results(namespace)
    if namespace.read is not None:
        return _report(_read(namespace.read), namespace.chart)
    plan = _plan(namespace)
    model = make_checkpoint(plan.shape, plan.folder / namespace.shape / "checkpoint")
    records: list[Record] = []

    def write(record: Record) -> None:
        records.append(record)
        line = json.dumps(record)
        print(line, flush=True)
        if namespace.output is not None:
            with namespace.output.open("a", encoding="utf-8") as output:
                output.write(line + "\n")

    try:
        with _interrupted_by_sigterm():
            Run(plan, _contenders(namespace, names, model, plan, write), write).run()
    except KeyboardInterrupt:
        say("interrupted; what was measured so far:")
        _report(records, namespace.chart)
        raise
    return _report(records, namespace.chart)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Lets SIGTERM do what Ctrl-C does, so that no engine is left running; signals belong to the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _plan(namespace: argparse.Namespace) -> Plan:
    if namespace.rounds < 1 or namespace.threads < 1:
        raise InvalidConfigError("rounds and threads must be at least 1")
    return Plan(
        shape_name=namespace.shape,
        shape=SHAPES[namespace.shape],
        cases=tuple(Case.parse(name.strip()) for name in namespace.cases.split(",")),
        rounds=namespace.rounds,
        threads=namespace.threads,
        quiet_load=namespace.quiet_load,
        quiet_limit=namespace.quiet_limit,
        time_limit=namespace.time_limit,
        folder=(namespace.work or namespace.environments.parent / "peers-work").resolve(),
    )


def _contenders(namespace: argparse.Namespace, names: Any, model: Path, plan: Plan, write: Any) -> list[Contender]:
    """Those that can take part; each other one becomes a record that says why not."""
    found: list[Contender] = []
    folder = namespace.environments.resolve()
    for name in names:
        if name == QUIRE:
            found += [quire_contender(model, arguments) for arguments in namespace.quire_args or [""]]
            continue
        try:
            found.append(peer_contender(name, model, folder, model.parent / f"{name}-conversion.log"))
        except UnavailableError as error:
            say(f"{name}: left out: {error}")
            common = {"benchmark": "peers", "shape": plan.shape_name, "engine": name, "threads": plan.threads}
            write({**common, "round": 0, "case": None, "error": str(error)})
    return found


def _check_results(namespace: argparse.Namespace) -> None:
    """Raises InvalidConfigError for a result that could not be written, before hours are spent on it."""
    if namespace.chart is not None:
        require_matplotlib()
    for path in (namespace.output, namespace.chart):
        if path is not None and not path.absolute().parent.is_dir():
            raise InvalidConfigError(f"{path} cannot be written: {path.parent} is not a folder")


def _install(names: list[str], folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    failed = environments.install(names, folder.resolve())
    for name, reason in failed.items():
        say(f"{name}: {reason}")
    return int(bool(failed))


def _report(records: list[Record], chart: Path | None) -> int:
    """The table, and the chart if one is asked for; 1 where there is no figure."""
    if not records:
        return 1
    summary = summarize(records)
    print(table(summary))
    if chart is not None and summary.figures:
        write_chart(summary, chart)
        say(f"drawn: {chart}")
    return int(not summary.figures)


def _read(path: Path) -> list[Record]:
    """The records of one shape in a file. Raises InvalidConfigError."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    except (OSError, ValueError) as error:
        raise InvalidConfigError(f"{path} cannot be read: {error}") from error
    if len({record.get("shape") for record in records if record.get("benchmark") == "peers"}) != 1:
        raise InvalidConfigError(f"{path} does not hold JSON lines of quire bench peers for one shape")
    return records


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
