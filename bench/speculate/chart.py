"""The figures as a picture: throughput over batch size, acceptance over position, one dispatch beside two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from quire.bench.peers.chart import FAINT, INK, PAPER
from quire.bench.speculate.contenders import NO_SPECULATION
from quire.bench.speculate.report import Group, group_of, throughput_records, title_of, unfused_records
from quire.bench.speculate.rounds import Record

NUM_COLUMNS = 3
PANEL_HEIGHT = 3.5
# Light to dark, for few to many drafts, and for low to high acceptance.
SHADES = {
    "draft_model": ("#9ec5e0", "#4a90c2", "#164f7d"),
    "ngram": ("#f0bf98", "#dc7f3c", "#8f3f0d"),
}
OTHER_SHADES = ("#a8d5a2", "#4f9f58", "#1c5a2a")
ACCEPTANCE_SHADES = ("#b9a7cf", "#8f6fb5", "#65409a", "#3b1a6b")
FUSED_COLOR, UNFUSED_COLOR = "#4a90c2", "#d4dae0"

Draw = Callable[[Any], None]


def write_chart(records: Sequence[Record], path: Path) -> None:
    """Draws all records. The file's ending says its format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    panels = _panels(records)
    num_rows = -(-len(panels) // NUM_COLUMNS)
    height = num_rows * PANEL_HEIGHT + 1.1
    canvas = Canvas(figsize=(15, height), facecolor=PAPER)
    FigureCanvasAgg(canvas)
    axes = list(canvas.subplots(num_rows, NUM_COLUMNS, squeeze=False).flat)
    for draw, panel in zip(panels, axes, strict=False):
        draw(panel)
        _style(panel)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    canvas.text(0.02, 1 - 0.36 / height, "Speculative decoding in quire", fontsize=17, fontweight="bold", color=INK)
    canvas.text(0.02, 1 - 0.62 / height, _note(records), fontsize=10.5, color=FAINT)
    canvas.subplots_adjust(
        left=0.05,
        right=0.985,
        top=1 - 1.35 / height,
        bottom=0.55 / height,
        wspace=0.24,
        hspace=1.0 / (PANEL_HEIGHT - 1.0),
    )
    canvas.savefig(path, dpi=130)


def _panels(records: Sequence[Record]) -> list[Draw]:
    """What draws each panel, in their order."""
    throughput = throughput_records(records)
    real = [record for record in throughput if record["acceptance"] is None]
    forced = [record for record in throughput if record["acceptance"] is not None]
    panels: list[Draw] = []
    for group in dict.fromkeys(map(group_of, real)):
        panels.append(partial(_draw_ratios, group, [record for record in real if group_of(record) == group]))
    for temperature in dict.fromkeys(record["temperature"] for record in forced):
        panels.append(partial(_draw_forced_ratios, [r for r in forced if r["temperature"] == temperature]))
    if real:
        panels.append(partial(_draw_acceptance, real))
    if forced:
        panels.append(partial(_draw_forced_acceptance, forced))
    if rounds := unfused_records(records):
        panels.append(partial(_draw_unfused, rounds))
    return panels


def _note(records: Sequence[Record]) -> str:
    throughput = throughput_records(records)
    num_rounds = max((record["ratio"]["num_rounds"] for record in throughput), default=0)
    where = dict.fromkeys(f"{record['model']}, {record['dtype']}" for record in records if "model" in record)
    return (
        f"{' and '.join(where)}; output tokens per second over the same engine without speculation, medians of {num_rounds} "
        "interleaved rounds, bars from lowest to highest"
    )


def _draw_ratios(group: Group, records: Sequence[Record], axes: Any) -> None:
    """Throughput over that without speculation: a line per contender."""
    for name in dict.fromkeys(record["name"] for record in records if record["method"] != NO_SPECULATION):
        mine = [record for record in records if record["name"] == name]
        _draw_line(axes, mine, name, _shade(mine[0], records), is_dashed=mine[0]["num_drafts"] is None)
    _style_ratios(axes, title_of(group), records)


def _draw_forced_ratios(records: Sequence[Record], axes: Any) -> None:
    """The same where acceptance is forced: a colour per acceptance, for the largest fixed number of drafts and the adaptive one."""
    most = _most_drafts(records)
    for record in _firsts(records, lambda r: (r["acceptance"], r["name"])):
        if record["num_drafts"] in (None, most) and record["method"] != NO_SPECULATION:
            mine = [r for r in records if (r["acceptance"], r["name"]) == (record["acceptance"], record["name"])]
            is_adaptive = record["num_drafts"] is None
            label = f"{record['acceptance']:g}{' adaptive' if is_adaptive else f' K={most}'}"
            _draw_line(axes, mine, label, _acceptance_shade(record, records), is_dashed=is_adaptive)
    title = f"acceptance forced, {records[0]['model']}, temperature {records[0]['temperature']:g}"
    _style_ratios(axes, title, records)


def _draw_line(axes: Any, records: Sequence[Record], label: str, color: str, *, is_dashed: bool) -> None:
    ordered = sorted(records, key=lambda record: record["batch_size"])
    medians = [record["ratio"]["median"] for record in ordered]
    below = [max(record["ratio"]["median"] - record["ratio"]["low"], 0.0) for record in ordered]
    above = [max(record["ratio"]["high"] - record["ratio"]["median"], 0.0) for record in ordered]
    sizes = [record["batch_size"] for record in ordered]
    axes.errorbar(
        sizes, medians, yerr=[below, above], color=color, alpha=0.4, linewidth=0, elinewidth=0.9, capsize=2, zorder=2
    )
    style = "--" if is_dashed else "-"
    axes.plot(
        sizes, medians, label=label, color=color, linestyle=style, marker="o", markersize=4, linewidth=1.8, zorder=3
    )


def _style_ratios(axes: Any, title: str, records: Sequence[Record]) -> None:
    sizes = sorted({record["batch_size"] for record in records})
    axes.axhline(1.0, color=INK, linewidth=1.0, zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(0, 1.45 * max(1.0, *(record["ratio"]["median"] for record in records)))
    axes.set_xlabel("batch size", fontsize=9, color=FAINT)
    _title(axes, title, "tokens/s over no speculation")
    axes.legend(fontsize=7.5, ncols=2, frameon=False, loc="upper right")


def _draw_acceptance(records: Sequence[Record], axes: Any) -> None:
    """The share of rounds that accept up to each position, of the largest fixed number of drafts, in the largest batch."""
    most = _most_drafts(records)
    largest = max(record["batch_size"] for record in records)
    kinds = list(dict.fromkeys(record["kind"] for record in records))
    temperatures = list(dict.fromkeys(record["temperature"] for record in records))
    chosen = [r for r in records if r["num_drafts"] == most and r["batch_size"] == largest and r["accepted_per_pos"]]
    for record in chosen:
        shades = SHADES.get(record["method"], OTHER_SHADES)
        axes.plot(
            range(1, len(record["accepted_per_pos"]) + 1),
            record["accepted_per_pos"],
            label=f"{record['method']}, {record['kind']}, t={record['temperature']:g}",
            color=shades[2 if record["temperature"] == temperatures[0] else 1],
            linestyle="-" if record["kind"] == kinds[0] else ":",
            marker="o",
            markersize=4,
            linewidth=1.8,
        )
    _style_acceptance(axes, most)
    _title(
        axes,
        f"acceptance per position, K={most}, batch {largest}",
        "share of the rounds with drafts that accept up to it",
    )


def _draw_forced_acceptance(records: Sequence[Record], axes: Any) -> None:
    most = _most_drafts(records)
    chosen = [r for r in records if r["num_drafts"] == most and r["method"] != NO_SPECULATION]
    largest = max(record["batch_size"] for record in records)
    for record in _firsts([r for r in chosen if r["batch_size"] == largest], lambda r: r["acceptance"]):
        color = _acceptance_shade(record, records)
        positions = list(range(1, most + 1))
        axes.plot(positions, [record["acceptance"] ** i for i in positions], color=color, linewidth=1, linestyle=":")
        axes.plot(
            positions,
            record["accepted_per_pos"],
            color=color,
            marker="o",
            linewidth=0,
            label=f"{record['acceptance']:g}",
        )
    _style_acceptance(axes, most)
    _title(axes, f"acceptance per position, forced, K={most}", "dots: measured; lines: what was asked for")


def _style_acceptance(axes: Any, most: int) -> None:
    axes.set_ylim(0, 1.5)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.set_xlim(0.7, most + 0.3)
    axes.set_xticks(range(1, most + 1))
    axes.set_xlabel("position of the draft", fontsize=9, color=FAINT)
    axes.legend(fontsize=7.5, ncols=2, frameon=False, loc="upper right")


def _draw_unfused(records: Sequence[Record], axes: Any) -> None:
    """The fused round's milliseconds as a share of the unfused one's."""
    for row, record in enumerate(records):
        share = 1 - record["saved_share"]["median"]
        axes.barh(row, 1.0, height=0.56, color=UNFUSED_COLOR, zorder=2, label="two dispatches" if row == 0 else None)
        axes.barh(row, share, height=0.36, color=FUSED_COLOR, zorder=3, label="one dispatch" if row == 0 else None)
        bounds = [1 - record["saved_share"]["high"], 1 - record["saved_share"]["low"]]
        axes.plot(bounds, [row, row], color=INK, linewidth=1.1, zorder=4, solid_capstyle="butt")
        saved = f"{record['saved_ms']['median']:+.2f} ms, {100 * record['saved_share']['median']:+.1f} %"
        text = f"{record['fused_ms']['median']:.3g} of {record['unfused_ms']['median']:.3g} ms\nsaved {saved}"
        axes.text(max(1.0, bounds[1]) + 0.03, row, text, va="center", fontsize=8, color=INK)
        name = f"{record['model']}, {record['name']}, batch {record['batch_size']}"
        axes.text(0, row - 0.4, name, va="bottom", fontsize=8, color=INK)
    axes.set_yticks([])
    axes.set_ylim(len(records) - 0.4, -1.3)
    axes.set_xlim(0, 2.1)
    axes.set_xticks([0, 0.5, 1.0], ["0", "50 %", "100 %"])
    axes.legend(fontsize=7.5, ncols=2, frameon=False, loc="upper left")
    _title(axes, "drafting in the step itself", "time of a step, share of drafting and verifying apart")


def _title(axes: Any, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=19)
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=9, color=FAINT, va="bottom")


def _style(axes: Any) -> None:
    axes.tick_params(labelsize=8, color=FAINT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def _most_drafts(records: Sequence[Record]) -> int:
    """The largest fixed number of drafts."""
    return max(record["num_drafts"] or 0 for record in records)


def _firsts(records: Sequence[Record], key: Callable[[Record], Any]) -> list[Record]:
    """The first record of each key."""
    found: dict[Any, Record] = {}
    for record in records:
        found.setdefault(key(record), record)
    return list(found.values())


def _shade(record: Record, records: Sequence[Record]) -> str:
    """By method; darker for more drafts, and darkest for as many as the engine likes."""
    shades = SHADES.get(record["method"], OTHER_SHADES)
    if record["num_drafts"] is None:
        return shades[-1]
    counts = sorted({r["num_drafts"] for r in records if r["method"] == record["method"] and r["num_drafts"]})
    return shades[min(counts.index(record["num_drafts"]), len(shades) - 1)]


def _acceptance_shade(record: Record, records: Sequence[Record]) -> str:
    acceptances = sorted({r["acceptance"] for r in records})
    return ACCEPTANCE_SHADES[min(acceptances.index(record["acceptance"]), len(ACCEPTANCE_SHADES) - 1)]
