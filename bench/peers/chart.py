"""The figures as a picture: a panel per case, a bar per engine, the spread as a thin line over it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from quire.bench.peers.report import Figure, Summary, is_quire, title_of
from quire.bench.peers.workload import Case
from quire.kernels.errors import InvalidConfigError

NUM_COLUMNS = 3
INK, FAINT, PAPER = "#22262b", "#8b939c", "#ffffff"
QUIRE_COLORS = ("#c8442e", "#e08a5a", "#edbd92")  # this engine, then this engine with other arguments
PEER_COLOR = "#b9c2cc"
BEST_PEER_COLOR = "#7f93a8"
UNITS = {"s": "seconds"}  # where there is room to spell them out


def require_matplotlib() -> None:
    """Raises InvalidConfigError where there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidConfigError("a chart needs matplotlib: pip install 'quire[bench]'")


def write_chart(summary: Summary, path: Path) -> None:
    """Draws all cases that have a figure. The file's ending says its format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    cases = [case for case in summary.cases if any((name, case.name) in summary.figures for name in summary.engines)]
    num_rows = -(-len(cases) // NUM_COLUMNS)
    panel_height = 0.75 + 0.34 * len(summary.engines)
    height = num_rows * panel_height + 1.3
    canvas = Canvas(figsize=(12.5, height), facecolor=PAPER)
    FigureCanvasAgg(canvas)
    panels = list(canvas.subplots(num_rows, NUM_COLUMNS, squeeze=False).flat)
    for case, axes in zip(cases, panels, strict=False):
        _draw_panel(axes, summary, case)
    for axes in panels[len(cases) :]:
        axes.set_visible(False)
    _titles(canvas, summary, height)
    canvas.subplots_adjust(
        left=0.11, right=0.975, top=1 - 1.15 / height, bottom=0.4 / height, wspace=0.52, hspace=0.72 / panel_height
    )
    canvas.savefig(path, dpi=150)


def _titles(canvas: Any, summary: Summary, height: float) -> None:
    num_rounds = max(figure.num_rounds for figure in summary.figures.values())
    canvas.text(
        0.02, 1 - 0.36 / height, f"quire and its peers on {summary.shape}", fontsize=17, fontweight="bold", color=INK
    )
    note = (
        f"random weights, {summary.threads} threads, median of {num_rounds} interleaved rounds with a line from lowest to highest; "
        "the best peer is dark, (1.2 x) is 1.2 times as good as it"
    )
    canvas.text(0.02, 1 - 0.64 / height, note, fontsize=10.5, color=FAINT)


def _draw_panel(axes: Any, summary: Summary, case: Case) -> None:
    found = [(name, summary.figures.get((name, case.name))) for name in summary.engines]
    best = summary.best_peer(case)
    top = max(figure.high for _, figure in found if figure is not None)
    for row, (name, figure) in enumerate(found):
        if figure is None:
            axes.text(0.01 * top, row, "no figure", va="center", fontsize=8.5, color=FAINT, style="italic")
            continue
        color = _color(summary, name, best[0] if best else None)
        axes.barh(row, figure.median, height=0.66, color=color, zorder=2)
        _draw_spread(axes, row, figure)
        weight = "bold" if is_quire(name) else "normal"
        text = f"{_number(figure.median)}{_ratio(summary, name, case)}"
        axes.text(figure.high + 0.025 * top, row, text, va="center", fontsize=9, color=INK, fontweight=weight)
    _style(axes, [name for name, _ in found], case, top)


def _draw_spread(axes: Any, row: int, figure: Figure) -> None:
    axes.plot([figure.low, figure.high], [row, row], color=INK, linewidth=1.1, zorder=3, solid_capstyle="butt")
    for end in (figure.low, figure.high):
        axes.plot([end, end], [row - 0.13, row + 0.13], color=INK, linewidth=1.1, zorder=3)


def _style(axes: Any, names: list[str], case: Case, top: float) -> None:
    direction = "longer is better" if case.higher_is_better else "shorter is better"
    axes.set_title(case.title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=19)
    axes.text(
        0,
        1.03,
        f"{UNITS.get(case.unit, case.unit)}, {direction}",
        transform=axes.transAxes,
        fontsize=9,
        color=FAINT,
        va="bottom",
    )
    axes.set_yticks(range(len(names)), [title_of(name) for name in names], fontsize=9.5)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(INK)
        label.set_fontweight("bold" if is_quire(name) else "normal")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1.42 * top)  # room for the numbers
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(FAINT)


def _color(summary: Summary, name: str, best: str | None) -> str:
    if is_quire(name):
        own = [engine for engine in summary.engines if is_quire(engine)]
        return QUIRE_COLORS[min(own.index(name), len(QUIRE_COLORS) - 1)]
    return BEST_PEER_COLOR if name == best else PEER_COLOR


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(summary: Summary, name: str, case: Case) -> str:
    ratio = summary.ratio(name, case) if is_quire(name) else None
    return "" if ratio is None else f"  ({ratio:.2f} x)"
