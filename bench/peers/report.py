"""From the records of a run to medians, spread and ratios, and these as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quire.bench.peers.engines import ENGINES, PEERS, QUIRE
from quire.bench.peers.shapes import SHAPES
from quire.bench.peers.workload import DECODE_LEN, DEFAULT_CASES, MIXED_INPUT_LEN, MIXED_OUTPUT_LEN, Case

Record = dict[str, Any]
# By kind of case, or by what kinds begin with.
HOW_MEASURED = {
    "decode": f"decode: prompts and outputs of {DECODE_LEN} tokens, timed while all requests decode, after the last of their first tokens",
    "prefill": "prefill: the tokens of one prompt over the time to the first token",
    "mixed": "mixed: prompts of {} to {} tokens, outputs of {} to {}, all there at the start; output tokens over the whole run".format(
        *MIXED_INPUT_LEN, *MIXED_OUTPUT_LEN
    ),
    "ready": "ready: from the start of the process to the answer to a first request of 4 tokens; cold: with no cache of compiled programs",
    "memory": "peak memory: of the process and what it has started, after the other cases; files mapped into memory count",
}


@dataclass(frozen=True)
class Figure:
    """One engine on one case: the median of its rounds and their bounds."""

    median: float
    low: float
    high: float
    num_rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    @property
    def spread(self) -> float:
        """From the lowest to the highest, as a share of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Summary:
    """All figures by engine and case name, in the order they came up, with what is to be said beside them."""

    shape: str
    threads: int
    cases: tuple[Case, ...]
    engines: tuple[str, ...]
    figures: dict[tuple[str, str], Figure]
    about: dict[str, str]
    failures: tuple[str, ...]
    loads: tuple[float, ...]
    num_not_quiet: int
    agreement: dict[str, float]

    def best_peer(self, case: Case) -> tuple[str, Figure] | None:
        """The best engine apart from quire, by its median; None where no peer has a figure."""
        peers = [
            (name, figure)
            for name in self.engines
            if not is_quire(name) and (figure := self.figures.get((name, case.name)))
        ]
        best = max if case.higher_is_better else min
        return best(peers, key=lambda peer: peer[1].median, default=None)

    def ratio(self, engine: str, case: Case) -> float | None:
        """How many times better than the best peer an engine is: above 1 is better, whatever way is up. None without both."""
        mine, best = self.figures.get((engine, case.name)), self.best_peer(case)
        if mine is None or best is None or not mine.median or not best[1].median:
            return None
        ratio = mine.median / best[1].median
        return ratio if case.higher_is_better else 1 / ratio


def is_quire(name: str) -> bool:
    """Whether a name is of this engine, with whatever arguments."""
    return name.split()[0] == QUIRE


def title_of(name: str) -> str:
    """An engine's name as its makers write it."""
    return PEERS[name].title if name in PEERS else name


def summarize(records: Sequence[Record]) -> Summary:
    """Everything that the records of one shape say. There must be at least one."""
    values: dict[tuple[str, str], list[float]] = {}
    for record in records:
        if "value" in record:
            values.setdefault((record["engine"], record["case"]), []).append(record["value"])
    names = dict.fromkeys(record["case"] for record in records if record["case"] is not None)
    engines = dict.fromkeys(record["engine"] for record in records)
    about = {r["engine"]: f"{r['version']}; {r['runs']}" for r in records if "version" in r}
    return Summary(
        shape=records[0]["shape"],
        threads=records[0]["threads"],
        cases=tuple(sorted(map(Case.parse, names), key=_place)),
        engines=tuple(sorted(engines, key=lambda name: ENGINES.index(name.split()[0]))),
        figures={key: Figure.of(found) for key, found in values.items()},
        about=about,
        failures=tuple(dict.fromkeys(_failure(record) for record in records if "error" in record)),
        loads=tuple(record["other_load"] for record in records if record.get("other_load") is not None),
        num_not_quiet=sum(record.get("quiet") is False for record in records),
        agreement=_agreement(records),
    )


def _failure(record: Record) -> str:
    case = "" if record["case"] is None else f", {record['case']}"
    return f"{title_of(record['engine'])}{case}: {record['error']}"


def _place(case: Case) -> tuple[int, int]:
    """Where a case stands in a table: by its kind, then by its number."""
    kinds = list(dict.fromkeys(Case.parse(name).kind for name in DEFAULT_CASES))
    return kinds.index(case.kind), case.number


def _agreement(records: Sequence[Record]) -> dict[str, float]:
    """For each engine the share of requests whose first token is the one that most engines gave.

    In bfloat16 near ties go either way; an engine that ran another model would have next to none.
    """
    firsts: dict[str, dict[tuple[str, int], int]] = {}
    for record in records:
        for idx, token_id in enumerate(record.get("first_tokens", ())):
            firsts.setdefault(record["engine"], {})[record["case"], idx] = token_id
    places = {place for found in firsts.values() for place in found}
    usual = {place: statistics.mode(f[place] for f in firsts.values() if place in f) for place in places}
    return {
        engine: sum(usual[place] == token_id for place, token_id in found.items()) / len(found)
        for engine, found in firsts.items()
    }


def table(summary: Summary) -> str:
    """The figures as a Markdown table, a row per case, and what is to be said beside them below it."""
    head = [
        "",
        *map(title_of, summary.engines),
        *(f"{engine} / best peer" for engine in summary.engines if is_quire(engine)),
    ]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    rows += [_row(summary, case) for case in summary.cases]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([_title(summary), "", *lines, "", *_notes(summary)])


def _row(summary: Summary, case: Case) -> list[str]:
    cells = [f"{case.title}, {case.unit}"]
    for engine in summary.engines:
        figure = summary.figures.get((engine, case.name))
        cells.append("" if figure is None else f"{figure.median:.4g} ({figure.low:.4g}..{figure.high:.4g})")
    for engine in summary.engines:
        if is_quire(engine):
            ratio, best = summary.ratio(engine, case), summary.best_peer(case)
            cells.append("" if ratio is None or best is None else f"{ratio:.2f} ({title_of(best[0])})")
    return cells


def _title(summary: Summary) -> str:
    num_rounds = max((figure.num_rounds for figure in summary.figures.values()), default=0)
    return (
        f"{summary.shape}, random weights, {summary.threads} threads; medians of {num_rounds} interleaved rounds (lowest..highest); "
        "a ratio above 1 means that quire is better"
    )


def _notes(summary: Summary) -> list[str]:
    lines = [
        f"* {how}" for kind, how in HOW_MEASURED.items() if any(case.kind.startswith(kind) for case in summary.cases)
    ]
    if (shortened := SHAPES[summary.shape].shortened) > 1:
        lines.append(f"* all lengths divided by {shortened}: figures of this shape are for tests")
    lines += [f"* {title_of(engine)}: {about}" for engine, about in summary.about.items()]
    if summary.agreement:
        shares = ", ".join(f"{title_of(engine)} {100 * share:.0f} %" for engine, share in summary.agreement.items())
        lines.append(f"* first tokens that are those of the majority: {shares}")
    if summary.loads:
        lines.append(
            f"* load of others while measuring: median {100 * statistics.median(summary.loads):.1f} %, "
            f"at most {100 * max(summary.loads):.1f} % of the machine; "
            f"{summary.num_not_quiet} measurements began before it was quiet"
        )
    return lines + [f"* left out: {failure}" for failure in summary.failures]
