"""`quire bench compare A B`: better, worse or not to be told apart, metric by metric, with the spread that says so."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quire.kernels.errors import InvalidConfigError

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95
# Parts of a metric's name that say which way is better; others are shown and not judged.
HIGHER_IS_BETTER = ("per_s", "share_kept", "goodput.share", "goodput.requests_per_s", "hit")
LOWER_IS_BETTER = (
    "_s.",
    "_ms",
    "_us",
    "seconds",
    "padding",
    "waste",
    "preemptions",
    "errors",
    "host_share",
    "recompilations",
)


@dataclass(frozen=True)
class Verdict:
    """One metric of both sides. `low` and `high` bound B's change against A, as a share of A, None without any spread."""

    name: str
    a: float
    b: float
    low: float | None
    high: float | None
    word: str

    @property
    def change(self) -> float:
        """B's change against A, as a share of A."""
        return (self.b - self.a) / abs(self.a) if self.a else math.nan


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "compare", help="compare two results: better, worse, or no difference beyond the spread"
    )
    parser.add_argument("a", type=Path, metavar="A", help="the baseline: a file of a benchmark, a JSON line per repeat")
    parser.add_argument("b", type=Path, metavar="B", help="what is compared with it")
    parser.add_argument(
        "--fail-if-worse",
        type=float,
        metavar="PERCENT",
        help="exit with 1 where a metric is surely worse by more than this",
    )
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Prints a table; 1 where `--fail-if-worse` was exceeded."""
    verdicts = compare(read(namespace.a), read(namespace.b))
    width = max([len(verdict.name) for verdict in verdicts], default=10)
    print(f"{'metric':{width}}  {'A':>12}  {'B':>12}  {'change':>8}  95 % interval       verdict")
    for verdict in verdicts:
        interval = "no spread known  "
        if verdict.low is not None and verdict.high is not None:
            interval = f"{100 * verdict.low:+7.1f}..{100 * verdict.high:+7.1f} %"
        print(
            f"{verdict.name:{width}}  {verdict.a:12.5g}  {verdict.b:12.5g}  {100 * verdict.change:+7.1f}%  {interval:18}  {verdict.word}"
        )
    limit = namespace.fail_if_worse
    failed = limit is not None and any(v.word == "worse" and 100 * abs(v.change) > limit for v in verdicts)
    return int(failed)


def read(path: Path) -> list[dict[str, Any]]:
    """The repeats in a file. Raises InvalidConfigError for what is no result of a benchmark."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InvalidConfigError(f"{path} is no result of a benchmark: {error}") from error
    if not lines or not all(isinstance(line, dict) for line in lines):
        raise InvalidConfigError(f"{path} holds no JSON line of a benchmark")
    return lines


def compare(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Every number that both sides have.

    With records, latencies get a bootstrap interval over requests. With several repeats, any metric gets one over repeats. A single number
    without either is shown, and never called better or worse: nobody knows how much of it is noise.
    """
    verdicts = []
    flat_a, flat_b = [_flat(line) for line in a], [_flat(line) for line in b]
    samples_a, samples_b = _samples(a), _samples(b)
    for name in flat_a[0]:
        values_a = [line[name] for line in flat_a if name in line]
        values_b = [line[name] for line in flat_b if name in line]
        direction = _direction(name)
        if not values_b or direction == 0:
            continue
        interval = None
        if len(values_a) > 1 and len(values_b) > 1:
            interval = _interval([[v] for v in values_a], [[v] for v in values_b], np.median)
        elif (parts := _sample_of(name)) is not None and samples_a[parts[0]] and samples_b[parts[0]]:
            interval = _interval(samples_a[parts[0]], samples_b[parts[0]], parts[1])
        verdicts.append(_verdict(name, float(np.median(values_a)), float(np.median(values_b)), interval, direction))
    return verdicts


def _verdict(name: str, a: float, b: float, interval: tuple[float, float] | None, direction: int) -> Verdict:
    if interval is None:
        return Verdict(name, a, b, None, None, "single sample")
    low, high = interval
    if low > 0:
        word = "better" if direction > 0 else "worse"
    elif high < 0:
        word = "worse" if direction > 0 else "better"
    else:
        word = "no difference"
    return Verdict(name, a, b, low, high, word)


def _direction(name: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither."""
    if any(part in name for part in HIGHER_IS_BETTER):
        return 1
    return -1 if any(part in name for part in LOWER_IS_BETTER) else 0


_SETTINGS = frozenset(
    {"records", "num_requests", "concurrency", "request_rate", "input_len", "output_len", "seed", "promise"}
)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested objects under dotted names; settings and records left out."""
    found: dict[str, float] = {}
    for name, item in value.items():
        if name in _SETTINGS or isinstance(item, bool):
            continue
        if isinstance(item, Mapping):
            found |= _flat(item, f"{prefix}{name}.")
        elif isinstance(item, int | float) and math.isfinite(item):
            found[prefix + name] = float(item)
    return found


def _samples(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Latencies of all records, request by request, by the name of their group of percentiles."""
    records = [record for line in lines for record in line.get("records", ())]
    done = [record for record in records if record.get("error") is None]
    return {
        "ttft_s": [[record["ttft"]] for record in done if record["ttft"] is not None],
        "itl_s": [record["inter_token"] for record in done if record["inter_token"]],
        "e2e_s": [[record["e2e"]] for record in done if record["e2e"] is not None],
    }


def _sample_of(name: str) -> tuple[str, Callable[[Any], Any]] | None:
    """Which sample a metric is a statistic of, and the statistic."""
    group, _, statistic = name.partition(".")
    if group not in ("ttft_s", "itl_s", "e2e_s"):
        return None
    if statistic == "mean":
        return group, np.mean
    quantile = float(statistic.removeprefix("p"))
    return group, lambda values: np.percentile(values, quantile)


def _interval(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], statistic: Callable[[Any], Any]
) -> tuple[float, float]:
    """The bootstrap interval of B's change against A, as a share of A (Efron and Tibshirani 1993, chapter 13).

    Whole requests are drawn, not single gaps: those of one request are alike.
    """
    rng = np.random.default_rng(0)
    sides = [[np.asarray(sample, np.float64) for sample in side] for side in (a, b)]
    base = abs(float(statistic(np.concatenate(sides[0])))) or math.nan

    def resampled(side: list[Any]) -> float:
        return float(statistic(np.concatenate([side[idx] for idx in rng.integers(0, len(side), len(side))])))

    changes = [(resampled(sides[1]) - resampled(sides[0])) / base for _ in range(NUM_RESAMPLES)]
    tail = 50 * (1 - CONFIDENCE)
    return float(np.percentile(changes, tail)), float(np.percentile(changes, 100 - tail))
