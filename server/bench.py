"""`quire bench`: the benchmarks of quire.bench as commands."""

from __future__ import annotations

from typing import Any

from quire.bench import compare, kernels, offline, quality, scheduler, serve
from quire.bench.peers import command as peers
from quire.bench.speculate import command as speculate


def add_command(commands: Any) -> None:
    """Adds the command, with one sub-command per benchmark."""
    parser = commands.add_parser(
        "bench", help="measure; each benchmark prints one JSON line; compare says better or worse"
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for module in (offline, scheduler, kernels, quality, serve, compare, peers, speculate):
        module.add_command(benchmarks)
