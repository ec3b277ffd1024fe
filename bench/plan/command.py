"""`quire plan`: whether some chips would keep a promise, without renting them: the scheduler is real, and the chips are simulated."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quire.bench.peers.chart import require_matplotlib
from quire.bench.plan import validation
from quire.bench.plan.chart import write_chart, write_search_chart
from quire.bench.plan.simulate import Result, Settings, search, simulate
from quire.bench.plan.summary import table
from quire.bench.plan.workload import built_in, load_workload, measured_acceptance
from quire.engine.admission import BATCHING_POLICIES
from quire.engine.arguments import add_engine_flags, engine_arguments
from quire.engine.simulation import Simulation
from quire.engine.speculation import SpeculativeConfig
from quire.kernels.errors import InvalidConfigError

OWN_SETTINGS = (
    "batching",
    "load_format",
    "emulate",
    "neuron_runtime",
    "compilation_cache",
    "simulated_speed",
    "simulated_output_tokens",
)
DEFAULT_SEQUENCES = 256
DEFAULT_DEVICE = "v5e:8"


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "plan",
        help="which chips keep a promise, on a simulated clock",
        description=(
            "Run the real scheduler and KV cache manager under a workload on chips that are not here: steps take what a roofline model "
            "of the chip says. Prints latencies, throughput, use of the cache, cost, and whether the promise is kept."
        ),
    )
    parser.add_argument("--model", "-m", default="llama-3.1-8b", help="a config that comes with quire (llama-3.1-8b, llama-3.3-70b, "
                        "llama-3.2-1b, qwen3-8b, qwen3-30b-a3b), a folder with a config.json, or an id (default: %(default)s)")  # fmt: skip
    parser.add_argument("--device", help=f"chip and how many devices, as inf2:24 (default: {DEFAULT_DEVICE})")
    parser.add_argument("--workload", "-w", default="chat", metavar="NAME|FILE",
                        help=f"{', '.join(built_in())}, a JSON file like workloads.json, or JSON lines of recorded requests "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the requests (default: %(default)s)")
    parser.add_argument("--duration", type=float, metavar="SECONDS", help="of the workload, in the place of its own")
    parser.add_argument("--tensor-parallel-size", type=int, metavar="N",
                        help="devices of each engine, so that several share the load; all together when left out")  # fmt: skip
    parser.add_argument("--policies", nargs="+", choices=BATCHING_POLICIES, default=["continuous"],
                        help="side by side on the same requests (default: continuous)")  # fmt: skip
    parser.add_argument("--acceptance", type=float, nargs="+", metavar="P",
                        help="of the drafts that come to be tested at each position, the share that is accepted; the last holds for "
                        "all after (default: 0.7)")  # fmt: skip
    parser.add_argument("--acceptance-file", type=Path, metavar="FILE",
                        help="take it from what quire bench speculate --json printed of the method of --speculative-config")  # fmt: skip
    parser.add_argument("--search", action="store_true", help="find the cheapest devices that keep the promise")
    parser.add_argument(
        "--search-chips", nargs="+", metavar="CHIP", help="among these (default: all that have a public price)"
    )
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="what --json printed of the run to compare with")
    parser.add_argument("--chips-file", type=Path, metavar="FILE", help="more chips, as backends/chips.json has them")
    parser.add_argument(
        "--efficiency-file", type=Path, metavar="FILE", help="what chips reach, as backends/efficiency.json has it"
    )
    parser.add_argument("--validate", action="store_true", help="simulate nothing: the model beside published results")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw it")
    parser.add_argument("--json", action="store_true", help="print JSON lines in the place of the table")
    taken = {"--device", "--tensor-parallel-size", "--seed"} | {f"--{name.replace('_', '-')}" for name in OWN_SETTINGS}
    add_engine_flags(parser, without=taken)
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Simulates and reports; 1 where the promise is broken."""
    if namespace.validate:
        _refuse("--validate", namespace, ("chips_file", "efficiency_file", "baseline", "plot", "search"))
        print(validation.table(validation.check(_say)))
        return 0
    if namespace.plot is not None:
        require_matplotlib()
        if not namespace.plot.absolute().parent.is_dir():
            raise InvalidConfigError(f"{namespace.plot} cannot be written: {namespace.plot.parent} is not a folder")
    if namespace.search:
        _refuse("--search", namespace, ("device", "tensor_parallel_size", "max_num_seqs", "baseline"))
        if len(namespace.policies) > 1:
            raise InvalidConfigError(f"--search is for one policy, not for {', '.join(namespace.policies)}")
    settings = _settings(namespace)
    if namespace.search:
        return _search(namespace, settings)
    results = []
    for policy in namespace.policies:
        _say(f"{settings.workload.describe()} on {settings.device}, {policy}")
        results.append(simulate(dataclasses.replace(settings, policy=policy), _progress()))
    return _report(namespace, results)


def _refuse(flag: str, namespace: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises InvalidConfigError for what was given and would be ignored."""
    if given := [name for name in names if getattr(namespace, name, None)]:
        raise InvalidConfigError(f"{', '.join(given)} cannot be given with {flag}, which decides or ignores it")


def _settings(namespace: argparse.Namespace) -> Settings:
    if namespace.seed < 0:
        raise InvalidConfigError(f"seed must be at least 0, not {namespace.seed}")
    arguments = engine_arguments(namespace)
    for name in ("device", "tensor_parallel_size", "model", "seed"):
        arguments.pop(name, None)
    arguments.setdefault("max_num_seqs", DEFAULT_SEQUENCES)
    workload = load_workload(namespace.workload)
    if namespace.duration is not None:
        if namespace.duration <= 0:
            raise InvalidConfigError(f"duration must be above 0 seconds, not {namespace.duration:g}")
        workload = dataclasses.replace(workload, duration_seconds=namespace.duration)
    return Settings(
        model=namespace.model,
        device=namespace.device or DEFAULT_DEVICE,
        workload=workload,
        seed=namespace.seed,
        tensor_parallel_size=namespace.tensor_parallel_size,
        arguments=arguments,
        simulation=_simulation(namespace, arguments.get("speculative_config")),
        chips_file=namespace.chips_file,
        efficiency_file=namespace.efficiency_file,
    )


def _simulation(namespace: argparse.Namespace, speculative_config: str | None) -> Simulation:
    """How often drafts are accepted, where there are any."""
    given, path = namespace.acceptance, namespace.acceptance_file
    if (given is not None or path is not None) and speculative_config is None:
        raise InvalidConfigError("acceptance says something of drafts, and there are none without --speculative-config")
    if given is not None and path is not None:
        raise InvalidConfigError("give acceptance or a file that it was measured in, not both")
    if path is not None:
        assert speculative_config is not None
        return Simulation(acceptance=measured_acceptance(path, SpeculativeConfig.parse(speculative_config).method))
    if given is None:
        return Simulation()
    if any(not 0.0 <= share <= 1.0 for share in given):
        raise InvalidConfigError(f"acceptance is a share, from 0 to 1, not {given}")
    return Simulation(acceptance=tuple(given))


def _search(namespace: argparse.Namespace, settings: Settings) -> int:
    if settings.workload.promise.metric == "baseline":
        raise InvalidConfigError(
            "a promise that compares with another run is none to search for; give a workload with another"
        )
    known = settings.chips()
    chips = namespace.search_chips or [name for name, chip in known.items() if chip.price(1) is not None]
    for name in chips:
        if name not in known:
            raise InvalidConfigError(f"chip {name!r} is not one of {', '.join(known)}")
        if known[name].price(1) is None:
            raise InvalidConfigError(f"chip {name!r} has no public price to search by")
    settings = dataclasses.replace(settings, policy=namespace.policies[0])
    found, tried = search(settings, chips, _say, _progress())
    if namespace.plot is not None and tried:
        write_search_chart(tried, settings.workload.promise, namespace.plot)
        _say(f"drawn: {namespace.plot}")
    if found is None:
        print(f"nothing of {', '.join(chips)} that was tried keeps the promise: {settings.workload.promise.describe()}")
        return 1
    if namespace.json:
        print(json.dumps(found.summary.to_json()))
    else:
        print(f"the cheapest that keeps it: {found.settings.device}, engines of {found.settings.tensor_parallel_size} devices, "
              f"max_num_seqs {found.summary.max_num_seqs}, {found.summary.fleet.usd_per_hour:.2f} dollars an hour\n")  # fmt: skip
        print(table([found.summary], settings.workload))
    return 0


def _report(namespace: argparse.Namespace, results: Sequence[Result]) -> int:
    workload, baseline = results[0].settings.workload, None
    if namespace.baseline is not None:
        try:
            lines = [json.loads(line) for line in namespace.baseline.read_text(encoding="utf-8").splitlines()]
            baseline = next(line for line in lines if line["benchmark"] == "plan")
        except (OSError, ValueError, KeyError, StopIteration, TypeError) as error:
            raise InvalidConfigError(
                f"{namespace.baseline} does not hold JSON lines of quire plan: {error!r}"
            ) from error
    summaries = [result.summary for result in results]
    if namespace.json:
        for result in results:
            kept = result.summary.kept(workload.promise, baseline)
            about = {
                "model": result.settings.model,
                "workload": workload.name,
                "seed": result.settings.seed,
                "kept": kept,
            }
            print(json.dumps({**result.summary.to_json(), **about}))
    else:
        print(f"{results[0].settings.model} on simulated {summaries[0].fleet.describe()}; {workload.describe()}\n")
        print(table(summaries, workload, baseline))
        print(f"\n{results[0].settings.backend().efficiency.source}")
    if namespace.plot is not None:
        write_chart(results, namespace.plot)
        _say(f"drawn: {namespace.plot}")
    return int(summaries[0].kept(workload.promise, baseline) is False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _progress() -> Callable[[float, int], None]:
    """Tells people every few seconds how far a long simulation is."""
    begin = last = time.monotonic()

    def tell(seconds: float, _: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= 5.0:
            last = now
            _say(f"  {seconds:,.0f} s simulated in {now - begin:.0f} s")

    return tell
