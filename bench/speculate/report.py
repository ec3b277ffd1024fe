"""From the records of a run to tables, and to the batch size up to which a method gains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.bench.speculate.contenders import NO_SPECULATION
from quire.bench.speculate.rounds import Record

Group = tuple[str, float | None, float]
"""What cases have in common that differ in their batch size alone: kind, forced acceptance, temperature."""


@dataclass(frozen=True)
class BreakEven:
    """Up to which batch size something is faster. `batch_size` is None where it is at none of those measured."""

    batch_size: float | None
    is_beyond: bool
    """Whether it still is at the largest that was measured, which `batch_size` then is."""

    def describe(self) -> str:
        """For people."""
        if self.batch_size is None:
            return "no gain at any batch size measured"
        if self.is_beyond:
            return f"gains up to the largest measured, {self.batch_size:g}"
        return f"breaks even at {self.batch_size:.1f}"


def break_even(ratios: Mapping[int, float]) -> BreakEven:
    """Where throughput over that without speculation, by batch size, falls below 1 for good.

    Between the last batch size that gains and the next one that was measured, the ratio is taken to be linear in log2 of the batch size.
    """
    sizes = sorted(ratios)
    gaining = [size for size in sizes if ratios[size] >= 1.0]
    if not gaining:
        return BreakEven(None, is_beyond=False)
    last = gaining[-1]
    if last == sizes[-1]:
        return BreakEven(float(last), is_beyond=True)
    following = sizes[sizes.index(last) + 1]
    share = (ratios[last] - 1.0) / (ratios[last] - ratios[following])
    log_size = math.log2(last) + share * (math.log2(following) - math.log2(last))
    return BreakEven(2.0**log_size, is_beyond=False)


def throughput_records(records: Iterable[Record]) -> list[Record]:
    """Those of contenders on cases."""
    return [record for record in records if record["benchmark"] == "speculate" and "ratio" in record]


def unfused_records(records: Iterable[Record]) -> list[Record]:
    """Those of the fused round beside the unfused one."""
    return [record for record in records if record.get("part") == "unfused"]


def group_of(record: Record) -> Group:
    """The group that a record's case belongs to."""
    return record["kind"], record["acceptance"], record["temperature"]


def title_of(group: Group) -> str:
    """For people."""
    kind, acceptance, temperature = group
    forced = "" if acceptance is None else f" acceptance {acceptance:g}"
    return f"{kind}{forced}, temperature {temperature:g}"


def ratios_by_batch(records: Iterable[Record]) -> dict[tuple[Group, str], dict[int, float]]:
    """Median ratios by group and contender, then by batch size."""
    found: dict[tuple[Group, str], dict[int, float]] = {}
    for record in throughput_records(records):
        if record["method"] != NO_SPECULATION:
            key = group_of(record), record["name"]
            found.setdefault(key, {})[record["batch_size"]] = record["ratio"]["median"]
    return found


def break_evens(records: Iterable[Record]) -> list[Record]:
    """A record for each contender and group."""
    return [
        {
            "benchmark": "speculate",
            "part": "break_even",
            "kind": group[0],
            "acceptance": group[1],
            "temperature": group[2],
            "name": name,
            "batch_size": found.batch_size,
            "gains_up_to_the_largest": found.is_beyond,
        }
        for (group, name), ratios in ratios_by_batch(records).items()
        for found in [break_even(ratios)]
    ]


def differing(records: Iterable[Record]) -> list[str]:
    """A sentence for each record whose tokens are not those that they are compared with."""
    return [
        f"{record['name']}, {title_of(group_of(record))}, batch {record['batch_size']}: "
        f"{100 * record['equal_share']:.2f} % of the tokens are equal; "
        "the first that differs is token {1} of request {0}".format(*record["first_difference"])
        for record in records
        if record.get("first_difference") is not None
    ]


def tables(records: Sequence[Record]) -> str:
    """Everything that the records say, as Markdown."""
    parts = []
    if throughput := throughput_records(records):
        groups = dict.fromkeys(map(group_of, throughput))
        parts += [_group_table(group, [r for r in throughput if group_of(r) == group]) for group in groups]
        parts.append(_break_even_table(throughput))
    if rounds := unfused_records(records):
        parts.append(_unfused_table(rounds))
    return "\n\n".join(parts + [_notes(records)])


def _group_table(group: Group, records: Sequence[Record]) -> str:
    head = [
        "batch",
        "",
        "tokens/s",
        "/ none",
        "tokens/round",
        "drafts/round",
        "rounds",
        "tokens/step",
        "accepted per position, %",
        "equal",
    ]
    rows = [head]
    for record in sorted(records, key=lambda record: record["batch_size"]):
        speculates = record["method"] != NO_SPECULATION
        rows.append(
            [
                str(record["batch_size"]),
                record["name"],
                _figure(record["tokens_per_s"], ".4g"),
                _figure(record["ratio"], ".2f") if record["name"] != NO_SPECULATION else "",
                f"{record['tokens_per_round']:.2f}" if speculates else "",
                f"{record['drafts_per_round']:.2f}" if speculates else "",
                str(record["rounds"]) if speculates else "",
                f"{record['tokens_per_step']:.2f}",
                " ".join(f"{100 * share:.0f}" for share in record["accepted_per_pos"]),
                _share(record["equal_share"]),
            ]
        )
    return f"{title_of(group)}\n\n{_markdown(rows)}"


def _break_even_table(records: Sequence[Record]) -> str:
    rows = [["", "", "batch size at which it breaks even"]]
    rows += [[title_of(group), name, break_even(r).describe()] for (group, name), r in ratios_by_batch(records).items()]
    return _markdown(rows)


def _unfused_table(records: Sequence[Record]) -> str:
    rows = [["one dispatch or two", "batch", "fused, ms/step", "unfused, ms/step", "saved, ms", "saved, %", "equal"]]
    for record in records:
        share = {name: 100 * value for name, value in record["saved_share"].items()}
        rows.append(
            [
                f"{record['name']}, {title_of(group_of(record))}",
                str(record["batch_size"]),
                _figure(record["fused_ms"], ".3f"),
                _figure(record["unfused_ms"], ".3f"),
                _figure(record["saved_ms"], ".3f"),
                _figure(share, ".1f"),
                _share(record["equal_share"]),
            ]
        )
    return _markdown(rows)


def _notes(records: Sequence[Record]) -> str:
    lines = []
    loads = [record["other_load"] for record in records if record.get("other_load") is not None]
    num_rounds = [record[key]["num_rounds"] for record in records for key in ("ratio", "fused_ms") if key in record]
    if num_rounds:
        num_engines = min((record["num_engines"] for record in records if "num_engines" in record), default=1)
        anew = f", shared out among {num_engines} engines made one after the other" if num_engines > 1 else ""
        lines.append(
            f"* medians of {min(num_rounds)} rounds (lowest..highest){anew}, in each of which the two of a ratio serve in turns; "
            "'none again' is another engine like 'none', and shows what the machine alone makes of a ratio"
        )
        lines.append(
            "* rounds: of all rows, those with drafts; accepted per position: of those that drafted so far, the share that accepted so far"
        )
    if loads:
        lines.append(
            f"* load of others while measuring: {100 * min(loads):.0f} to {100 * max(loads):.0f} % of the machine"
        )
    lines += [f"* tokens differ: {sentence}" for sentence in differing(records)]
    return "\n".join(lines)


def _figure(figure: Mapping[str, Any], form: str) -> str:
    return f"{figure['median']:{form}} ({figure['low']:{form}}..{figure['high']:{form}})"


def _share(share: float) -> str:
    return "yes" if share == 1.0 else f"{100 * share:.2f} %"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
