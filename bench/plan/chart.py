"""A simulation as a picture: what came, what ran, how full the cache was, and how long people waited; and prices against promises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quire.bench.peers.chart import FAINT, INK, PAPER
from quire.bench.plan.fleet import Sample
from quire.bench.plan.simulate import Result
from quire.bench.plan.summary import first_token_seconds
from quire.bench.plan.workload import Promise

POLICY_COLORS = {"continuous": "#4a90c2", "windowed": "#dc7f3c", "static": "#4f9f58"}
KEPT_COLOR, BROKEN_COLOR = "#4f9f58", "#c9544d"
NUM_BINS = 60


def write_chart(results: Sequence[Result], path: Path) -> None:
    """Four panels over time, a colour for each policy. The file's ending says its format."""
    canvas, axes = _canvas(4, 2)
    workload = results[0].settings.workload
    for result in reversed(results):  # the first lies on top
        color, label = POLICY_COLORS[result.summary.policy], result.summary.policy
        _draw_requests(axes[0], result, color, label)
        samples = result.run.samples
        _draw_means(axes[1], samples, [100 * one.kv_usage for one in samples], color, label)
        answered = [outcome for outcome in result.run.outcomes if outcome.first_token is not None]
        _draw_percentiles(
            axes[2], [outcome.arrival.time for outcome in answered], [first_token_seconds(one) for one in answered],
            color, label,
        )  # fmt: skip
        _draw_percentiles(axes[3], result.run.gap_times, [1e3 * gap for gap in result.run.gaps], color, label)
    _draw_arrivals(axes[0], results[0])
    promise = workload.promise
    for panel, metric, scale in ((axes[2], "first_token", 1.0), (axes[3], "between_tokens", 1e3)):
        if promise.metric == metric:
            panel.axhline(scale * promise.seconds, color=BROKEN_COLOR, linewidth=1.0, linestyle=":", label="promise")
    titles = (
        ("requests", "running, waiting (faint); arrivals a second (grey, right)"),
        ("KV cache", "% of its blocks, fullest engine, means"),
        ("first token", "seconds by arrival: median, and p95 (faint)"),
        ("between tokens", "milliseconds: median, and p95 (faint)"),
    )
    for panel, (title, subtitle) in zip(axes, titles, strict=True):
        _style(panel, title, subtitle)
        panel.set_xlabel("seconds", fontsize=9, color=FAINT)
        panel.set_ylim(bottom=0)
        panel.legend(
            fontsize=8,
            frameon=False,
            loc="lower right",
            bbox_to_anchor=(1.02, 1.07),
            ncols=4,
            columnspacing=1.2,
            borderpad=0,
        )
    head = results[0]
    _title(
        canvas,
        workload.describe(),
        f"{head.settings.model} on simulated {head.summary.fleet.describe()}, seed {head.settings.seed}",
    )
    canvas.savefig(path, dpi=80)


def write_search_chart(tried: Sequence[Result], promise: Promise, path: Path) -> None:
    """Every fleet that was tried: what it costs, and what it did to the promise."""
    canvas, [axes] = _canvas(1, 1)
    is_share = promise.metric == "device_busy"
    for result in tried:
        kept = bool(result.summary.kept(promise))
        value = result.summary.busy_share if is_share else result.summary.first_token[1]
        price = result.summary.fleet.usd_per_hour
        assert price is not None, result
        axes.scatter(price, value, color=KEPT_COLOR if kept else BROKEN_COLOR, s=36, zorder=3)
        label = f"{result.settings.device}/{result.settings.tensor_parallel_size} x{result.summary.max_num_seqs}"
        axes.annotate(label, (price, value), fontsize=7, color=FAINT, xytext=(4, 3), textcoords="offset points")
    limit = promise.share if is_share else promise.seconds
    axes.axhline(limit, color=INK, linewidth=1.0, linestyle=":")
    if not is_share:
        axes.set_yscale("log")
    axes.set_xlabel("US dollars an hour", fontsize=9, color=FAINT)
    _style(
        axes,
        promise.describe(),
        "share of time busy" if is_share else "first token p95, seconds; devices/of each engine x requests at once",
    )
    head = tried[0]
    _title(canvas, "What keeps the promise", f"{head.settings.model}, {head.settings.workload.describe()}")
    canvas.savefig(path, dpi=80)


def _canvas(num_panels: int, num_columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    num_rows = -(-num_panels // num_columns)
    height = 3.4 * num_rows + 1.2
    canvas = Canvas(figsize=(6.8 * num_columns, height), facecolor=PAPER)
    FigureCanvasAgg(canvas)
    axes = list(canvas.subplots(num_rows, num_columns, squeeze=False).flat)
    canvas.subplots_adjust(left=0.07, right=0.95, top=1 - 1.35 / height, bottom=0.6 / height, hspace=0.45, wspace=0.22)
    return canvas, axes


def _title(canvas: Any, title: str, note: str) -> None:
    height = canvas.get_figheight()
    canvas.text(0.03, 1 - 0.38 / height, title, fontsize=15, fontweight="bold", color=INK)
    canvas.text(0.03, 1 - 0.66 / height, note, fontsize=10, color=FAINT)


def _style(axes: Any, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=16)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=8.5, color=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5, colors=FAINT)
    axes.grid(axis="y", color="#eef0f2", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_requests(axes: Any, result: Result, color: str, label: str) -> None:
    samples = result.run.samples
    _draw_means(axes, samples, [one.num_running for one in samples], color, label)
    _draw_means(axes, samples, [one.num_waiting for one in samples], color, None)


def _draw_means(axes: Any, samples: Sequence[Sample], values: Sequence[float], color: str, label: str | None) -> None:
    """Over the time; faint without a label."""
    times = np.array([one.time for one in samples])
    edges = np.linspace(0, max(float(times.max()), 1.0), NUM_BINS + 1)
    bins = np.digitize(times, edges[1:-1])
    found = [(edges[idx], np.asarray(values)[bins == idx]) for idx in range(NUM_BINS)]
    middles = [edge + (edges[1] - edges[0]) / 2 for edge, mine in found if len(mine)]
    means = [float(mine.mean()) for _, mine in found if len(mine)]
    axes.plot(middles, means, color=color, label=label, linewidth=1.4 if label else 1.0, alpha=1.0 if label else 0.4)


def _draw_arrivals(axes: Any, result: Result) -> None:
    times = [outcome.arrival.time for outcome in result.run.outcomes]
    end = max(max(times), 1.0)
    counts, edges = np.histogram(times, bins=NUM_BINS, range=(0, end))
    right = axes.twinx()
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)
    right.fill_between(edges[:-1], counts / (end / NUM_BINS), step="post", color="#d4dae0", alpha=0.6, zorder=0)
    right.set_ylim(0, 2.5 * max(counts / (end / NUM_BINS)))
    right.spines[["top", "right"]].set_visible(False)
    right.tick_params(labelsize=8, colors=FAINT)


def _draw_percentiles(axes: Any, times: Any, values: Any, color: str, label: str) -> None:
    """Over the time, in bins that have enough in them."""
    if not len(times):
        return
    moments, found = np.asarray(times), np.asarray(values)
    edges = np.linspace(0, max(float(moments.max()), 1.0), NUM_BINS + 1)
    bins = np.digitize(moments, edges) - 1
    middles, medians, high = [], [], []
    for idx in range(NUM_BINS):
        mine = found[bins == idx]
        if len(mine) >= 3:
            middles.append((edges[idx] + edges[idx + 1]) / 2)
            medians.append(float(np.median(mine)))
            high.append(float(np.percentile(mine, 95)))
    axes.plot(middles, medians, color=color, label=label, linewidth=1.4)
    axes.plot(middles, high, color=color, alpha=0.4, linewidth=1.0)
