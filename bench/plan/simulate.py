"""One simulation from settings: engines, traffic, run, summary; and the search for what keeps a promise at the least cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.backends.chips import Chip, all_chips, read_chips
from quire.backends.simulated import SimulatedBackend
from quire.bench.plan.fleet import Fleet, Run
from quire.bench.plan.summary import Fleetsize, Summary, summarize
from quire.bench.plan.workload import GeneratedTraffic, Workload
from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.planning import EnginePlan
from quire.engine.simulation import Simulation, VirtualClock
from quire.kernels.errors import BackendError, InvalidConfigError
from quire.models.checkpoint import resolve_model
from quire.models.parallel import check_divisible
from quire.models.registry import load_config

MODELS = Path(__file__).parent / "models"
DEVICE_COUNTS = (1, 2, 4, 8, 16, 32, 64)
SEQUENCE_COUNTS = (256, 64)
SEARCH_SECONDS = 180.0
"""Of a workload that goes on longer: what is searched with; what is found is then run as a whole."""
HOPELESS = 10.0
"""Times the promised seconds beyond which other settings of the same devices are not tried."""


@dataclass(frozen=True)
class Settings:
    """What is simulated."""

    model: str
    device: str
    workload: Workload
    seed: int = 0
    tensor_parallel_size: int | None = None
    """Of each engine; None is all devices together, or as many as can share the model."""
    policy: str = "continuous"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of the engines, beside these."""
    simulation: Simulation = Simulation()
    chips_file: Path | None = None
    efficiency_file: Path | None = None

    def chips(self) -> dict[str, Chip]:
        """Every chip that is known, the user's own among them."""
        return {**all_chips(), **(read_chips(self.chips_file) if self.chips_file else {})}

    def backend(self) -> SimulatedBackend:
        """All of the devices."""
        return SimulatedBackend(self.device, chips_file=self.chips_file, efficiency_file=self.efficiency_file)


@dataclass(frozen=True)
class Result:
    """A simulation and its figures."""

    settings: Settings
    summary: Summary
    run: Run


def model_path(name: str) -> str:
    """The folder of one of the configs that come with quire; any other name as it is."""
    return str(MODELS / name) if (MODELS / name / "config.json").is_file() else name


def simulate(settings: Settings, progress: Callable[[float, int], None] = lambda *_: None) -> Result:
    """Runs one. Raises InvalidConfigError or BackendError where it cannot be."""
    backend = settings.backend()
    size = settings.tensor_parallel_size or largest_size(settings.model, backend.num_devices)
    if backend.num_devices % size:
        raise InvalidConfigError(
            f"tensor_parallel_size={size} does not divide the {backend.num_devices} devices of {settings.device}"
        )
    config = engine_config(settings, size)
    engines = [
        EngineCore(config, backend=settings.backend(), clock=VirtualClock(), simulation=settings.simulation)
        for _ in range(backend.num_devices // size)
    ]
    run = Fleet(engines, settings.workload.temperature).run(
        GeneratedTraffic(settings.workload, settings.seed), progress
    )
    fleet = Fleetsize.of(backend.chip, backend.num_devices, len(engines))
    return Result(settings, summarize(settings.policy, fleet, engines, run, settings.workload), run)


def largest_size(model: str, num_devices: int) -> int:
    """The most of the devices that can share a model, all engines being of one size."""
    config = load_config(resolve_model(model_path(model)), None)
    for size in range(num_devices, 0, -1):
        if num_devices % size:
            continue
        try:
            check_divisible(config, size)
        except InvalidConfigError:
            continue
        return size
    return 1


def candidates(settings: Settings, chips: Sequence[str]) -> Iterator[tuple[float, Settings]]:
    """Fleets by their price an hour, the cheapest first; of equal price, fewer and larger engines first."""
    known = settings.chips()
    found: list[tuple[float, int, int, Settings]] = []
    for name in chips:
        for count in DEVICE_COUNTS:
            price = known[name].price(count)
            if price is None:
                continue
            for size in (size for size in DEVICE_COUNTS if size <= count):
                for sequences in SEQUENCE_COUNTS:
                    candidate = dataclasses.replace(
                        settings,
                        device=f"{name}:{count}",
                        tensor_parallel_size=size,
                        arguments={**settings.arguments, "max_num_seqs": sequences},
                    )
                    if fits(candidate):
                        found.append((price, -size, -sequences, candidate))
    found.sort(key=lambda each: each[:3])
    for price, _, _, candidate in found:
        yield price, candidate


def fits(settings: Settings) -> bool:
    """Whether the devices of an engine hold the model and a cache."""
    try:
        EnginePlan.make(engine_config(settings, settings.tensor_parallel_size or 1), settings.backend())
    except (InvalidConfigError, BackendError):
        return False
    return True


def engine_config(settings: Settings, size: int) -> EngineConfig:
    """Of each engine, which has so many devices."""
    arguments = {"max_model_len": settings.workload.longest + 1, **settings.arguments}
    return EngineConfig.from_arguments(
        model=model_path(settings.model),
        tensor_parallel_size=size,
        batching=settings.policy,
        load_format="dummy",
        **arguments,
    )


def search(
    settings: Settings,
    chips: Sequence[str],
    say: Callable[[str], None],
    progress: Callable[[float, int], None] = lambda *_: None,
    most_tries: int = 40,
) -> tuple[Result | None, list[Result]]:
    """The cheapest fleet that keeps the promise, run in full, and every one that was tried on the way, at most `most_tries`."""
    shorter = dataclasses.replace(
        settings.workload, duration_seconds=min(settings.workload.duration_seconds, SEARCH_SECONDS)
    )
    promise = settings.workload.promise
    tried: list[Result] = []
    hopeless: set[str] = set()
    for price, candidate in candidates(settings, chips):
        if len(tried) == most_tries:
            break
        if candidate.device in hopeless:
            continue
        result = simulate(dataclasses.replace(candidate, workload=shorter), progress)
        tried.append(result)
        kept = result.summary.kept(promise)
        measured = result.summary.percentile(promise)
        if measured is not None and measured > HOPELESS * promise.seconds:
            hopeless.add(candidate.device)
        say(
            f"{candidate.device}, engines of {candidate.tensor_parallel_size}, "
            f"max_num_seqs {candidate.arguments['max_num_seqs']}: {price:.2f} dollars an hour, "
            f"first token p95 {result.summary.first_token[1]:.2f} s, {'kept' if kept else 'broken'}"
        )
        if kept:
            whole = simulate(candidate, progress)
            if whole.summary.kept(promise):
                return whole, tried
            tried.append(whole)
    return None, tried
