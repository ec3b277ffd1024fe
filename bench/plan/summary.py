"""What a simulation comes to: the figures that users watch, and whether the promise is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from quire.backends.chips import Chip
from quire.bench.plan.fleet import Outcome, Run
from quire.bench.plan.workload import PERCENTILES, Promise, Workload
from quire.engine.core import EngineCore


@dataclass(frozen=True)
class Fleetsize:
    """What is rented."""

    chip: str
    num_devices: int
    num_replicas: int
    usd_per_hour: float | None
    """None where no price is public."""

    @classmethod
    def of(cls, chip: Chip, num_devices: int, num_replicas: int) -> Fleetsize:
        """Devices in all, and how many engines share them."""
        return cls(chip.name, num_devices, num_replicas, chip.price(num_devices))

    def describe(self) -> str:
        """For people."""
        engines = f", {self.num_replicas} engines" if self.num_replicas > 1 else ""
        return f"{self.chip}:{self.num_devices}{engines}"


@dataclass(frozen=True)
class Summary:
    """One simulation. Times in seconds; percentiles in the order of PERCENTILES."""

    policy: str
    fleet: Fleetsize
    max_num_seqs: int
    num_requests: int
    num_unfinished: int
    seconds: float
    first_token: tuple[float, ...]
    between_tokens: tuple[float, ...]
    queue: tuple[float, ...]
    output_tokens_per_s: float
    requests_per_s: float
    mean_kv_usage: float
    most_kv_usage: float
    num_preemptions: int
    cached_share: float
    """Of the prompts' tokens, those that were in the cache already."""
    busy_share: float
    """Of the devices' time."""
    padding_share: float
    """Of the tokens that were computed."""
    usd_per_1k_tokens: float | None
    """Of output."""
    num_steps: int
    host_ms_per_step: float
    """That the real scheduler took on this machine, `schedule` and `update` together."""
    wall_seconds: float

    def to_json(self) -> dict[str, Any]:
        """As one flat object."""
        flat = asdict(self)
        for name in ("first_token", "between_tokens", "queue"):
            values = flat.pop(name)
            flat |= {f"{name}_p{percent}": value for percent, value in zip(PERCENTILES, values, strict=True)}
        return {"benchmark": "plan", **flat, **flat.pop("fleet")}

    def kept(self, promise: Promise, baseline: Mapping[str, Any] | None = None) -> bool | None:
        """Whether the promise holds; None where there is no baseline to compare with."""
        if self.num_unfinished:
            return False
        if promise.metric == "device_busy":
            return self.busy_share >= promise.share
        if promise.metric == "baseline":
            if baseline is None:
                return None
            slower = [
                values[PERCENTILES.index(95)] <= promise.times * baseline[f"{name}_p95"]
                for name, values in (("first_token", self.first_token), ("between_tokens", self.between_tokens))
            ]
            return all(slower) and self.output_tokens_per_s * promise.times >= baseline["output_tokens_per_s"]
        measured = self.percentile(promise)
        return measured is not None and measured <= promise.seconds

    def percentile(self, promise: Promise) -> float | None:
        """The seconds that a promise is about; None where it is not about such."""
        if promise.metric not in ("first_token", "between_tokens"):
            return None
        values: tuple[float, ...] = getattr(self, promise.metric)
        return values[PERCENTILES.index(promise.percentile)]


def summarize(policy: str, fleet: Fleetsize, engines: Sequence[EngineCore], run: Run, workload: Workload) -> Summary:
    """The figures of a run."""
    done = [outcome for outcome in run.outcomes if outcome.is_done]
    first = [first_token_seconds(outcome) for outcome in run.outcomes if outcome.first_token is not None]
    num_output = sum(outcome.num_tokens for outcome in run.outcomes)
    seconds = max(run.seconds, 1e-9)
    real = sum(engine.runner.counters.num_real_tokens for engine in engines)
    padding = sum(engine.runner.counters.num_padding_tokens for engine in engines)
    usages = [sample.kv_usage for sample in run.samples] or [0.0]
    price = fleet.usd_per_hour
    num_prompt = sum(len(outcome.arrival.prompt) for outcome in run.outcomes)
    return Summary(
        policy=policy,
        fleet=fleet,
        max_num_seqs=engines[0].config.max_num_seqs,
        num_requests=len(run.outcomes),
        num_unfinished=len(run.outcomes) - len(done),
        seconds=run.seconds,
        first_token=_percentiles(first),
        between_tokens=_percentiles(run.gaps),
        queue=_percentiles([outcome.queue_seconds for outcome in run.outcomes]),
        output_tokens_per_s=num_output / seconds,
        requests_per_s=len(done) / seconds,
        mean_kv_usage=float(np.mean(usages)),
        most_kv_usage=max(usages),
        num_preemptions=sum(engine.scheduler.counters.num_preemptions for engine in engines),
        cached_share=sum(outcome.num_cached for outcome in run.outcomes) / max(num_prompt, 1),
        busy_share=run.busy_seconds / (seconds * len(engines)),
        padding_share=padding / max(real + padding, 1),
        usd_per_1k_tokens=None if price is None or not num_output else price * seconds / 3600 / num_output * 1000,
        num_steps=run.num_steps,
        host_ms_per_step=1e3 * run.host_seconds / max(run.num_steps, 1),
        wall_seconds=run.wall_seconds,
    )


def first_token_seconds(outcome: Outcome) -> float:
    """From its arrival."""
    assert outcome.first_token is not None, outcome
    return outcome.first_token - outcome.arrival.time


def _percentiles(values: Any) -> tuple[float, ...]:
    if not len(values):
        return tuple(float("nan") for _ in PERCENTILES)
    return tuple(float(x) for x in np.percentile(np.asarray(values), PERCENTILES))


def table(summaries: Sequence[Summary], workload: Workload, baseline: Mapping[str, Any] | None = None) -> str:
    """A column for each simulation."""

    def seconds(value: float) -> str:
        return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"

    def verdict(summary: Summary) -> str:
        kept = summary.kept(workload.promise, baseline)
        return "no baseline" if kept is None else "kept" if kept else "BROKEN"

    lines: list[tuple[str, list[str]]] = [("", [summary.policy for summary in summaries])]
    for name in ("first_token", "between_tokens", "queue"):
        for idx, percent in enumerate(PERCENTILES):
            label = f"{name.replace('_', ' ')} p{percent}"
            lines.append((label, [seconds(getattr(summary, name)[idx]) for summary in summaries]))
    rows: dict[str, Callable[[Summary], str]] = {
        "output tokens/s": lambda s: f"{s.output_tokens_per_s:,.0f}",
        "requests/s": lambda s: f"{s.requests_per_s:.2f}",
        "requests": lambda s: f"{s.num_requests:,}" + (f", {s.num_unfinished} open" if s.num_unfinished else ""),
        "KV cache in use, mean and most": lambda s: f"{s.mean_kv_usage:.0%}, {s.most_kv_usage:.0%}",
        "prompt tokens found in the cache": lambda s: f"{s.cached_share:.0%}",
        "preemptions": lambda s: f"{s.num_preemptions:,}",
        "devices busy": lambda s: f"{s.busy_share:.0%}",
        "computed in vain (padding)": lambda s: f"{s.padding_share:.0%}",
        "US dollars per 1,000 output tokens": lambda s: (
            "no public price" if s.usd_per_1k_tokens is None else f"{s.usd_per_1k_tokens:.5f}"
        ),
        "host, ms a step (this machine)": lambda s: f"{s.host_ms_per_step:.2f}",
    }
    lines += [(label, [show(summary) for summary in summaries]) for label, show in rows.items()]
    lines.append((f"promise: {workload.promise.describe()}", [verdict(summary) for summary in summaries]))
    width = max(len(label) for label, _ in lines)
    columns = [max(14, *(len(cells[idx]) for _, cells in lines)) for idx in range(len(summaries))]
    return "\n".join(
        f"{label:{width}}" + "".join(f"  {cell:>{size}}" for cell, size in zip(cells, columns, strict=True))
        for label, cells in lines
    )
