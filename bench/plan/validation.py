"""The cost model beside what others have published of real chips: `quire plan --validate`.

Each row says what was published and what the model gives for it. A factor of `efficiency.json` that was fitted is fitted to these rows,
and there are never more of them than a chip has rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quire.backends.roofline import Work, read_efficiencies
from quire.backends.simulated import SimulatedBackend
from quire.bench.plan.fleet import Fleet, Run
from quire.bench.plan.workload import GeneratedTraffic, Lengths, Promise, Workload
from quire.engine.config import EngineConfig
from quire.engine.core import EngineCore
from quire.engine.planning import EnginePlan
from quire.engine.simulation import Simulation, VirtualClock, model_cost

MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Row:
    """One published number."""

    chip: str
    what: str
    unit: str
    published: float
    predict: Callable[[], float]
    source: str
    note: str = ""


@dataclass(frozen=True)
class Checked:
    """A row, and what the model gives for it."""

    row: Row
    predicted: float

    @property
    def error(self) -> float:
        """Relative; above 0 where the model gives more."""
        return self.predicted / self.row.published - 1.0


def rows() -> list[Row]:
    """Every published number that is compared."""
    sglang = "lmsys.org/blog/2025-10-29-sglang-jax and its benchmarks"
    optimum = "huggingface.co/docs/optimum-neuron/benchmarks/inferentia-llama3.1-8b"
    nxd = "AWS Neuron SDK, tutorial nxdi-trn2-llama3.3-70b"
    rpa = "Ragged Paged Attention, arXiv 2604.15464"
    return [
        Row("v6e", "Qwen3-8B on 4, batch 64, 1k in 1k out: between tokens", "ms", 11.1, _sglang_gap, sglang),
        Row("v6e", "the same: throughput", "tokens/s", 5297, lambda: _sglang_throughput(64), sglang),
        Row("v6e", "the same, batch 256", "tokens/s", 7572, lambda: _sglang_throughput(256), sglang),
        Row("inf2", "Llama-3.1-8B on 8 cores, batch 32: between tokens", "ms", 24.5, _optimum_gap, optimum,
            "a cache of 4,096 tokens a row, all of it read"),
        Row("trn2", "Llama-3.3-70B on 64 devices, 10k in: first token", "s", 0.576, _nxd_first_token, nxd),
        Row("trn2", "the same, batch 1: between tokens", "ms", 19.6, _nxd_gap, nxd),
        Row("trn2", "the same, a 1B draft, 7 tokens a round: per token", "ms", 5.3, _nxd_draft_gap, nxd,
            "how many drafts were accepted is not published: all of them, in the model"),
        Row("tpu7x", "Llama-3-8B, decoding: attention's share of bandwidth", "%", 86.0, _rpa_share, rpa),
    ]  # fmt: skip


def check(progress: Callable[[str], None] = lambda _: None) -> list[Checked]:
    """Works out every row."""
    found = []
    for row in rows():
        progress(f"{row.chip}: {row.what}")
        found.append(Checked(row, row.predict()))
    return found


def table(checked: Sequence[Checked]) -> str:
    """For people."""
    lines = [f"{'chip':6} {'what':58} {'published':>16} {'model':>9} {'error':>7}"]
    for each in checked:
        row = each.row
        published = f"{row.published:,g} {row.unit}"
        lines.append(f"{row.chip:6} {row.what:58} {published:>16} {each.predicted:9,.4g} {each.error:+7.1%}")
        if row.note:
            lines.append(f"{'':6} ({row.note})")
    lines.append("")
    efficiencies = read_efficiencies()
    for chip in dict.fromkeys(each.row.chip for each in checked):
        count = sum(each.row.chip == chip for each in checked)
        fitted = efficiencies[chip].fitted
        lines.append(f"{chip}: {count} rows, fitted factors: {', '.join(fitted) or 'none'}")
    borrowed = [chip for chip, each in efficiencies.items() if not each.fitted]
    lines.append(f"nothing published was found for {', '.join(borrowed)}: their factors are borrowed")
    return "\n".join(lines)


def engine(device: str, model: str, tensor_parallel_size: int, **arguments: object) -> EngineCore:
    """A simulated engine for one of `MODELS`."""
    config = EngineConfig.from_arguments(
        model=str(MODELS / model), tensor_parallel_size=tensor_parallel_size, **arguments
    )
    return EngineCore(config, backend=SimulatedBackend(device), clock=VirtualClock(), simulation=Simulation())


def _sglang(batch_size: int) -> Run:
    core = engine("v6e:4", "qwen3-8b", 4, max_num_seqs=batch_size, max_model_len=2112, max_num_batched_tokens=2048)
    workload = Workload(
        "sglang", "", (1024, 1024), Lengths(most=1024, least=1024), Promise("first_token"), documents=2 * batch_size
    )
    return Fleet([core]).run(GeneratedTraffic(workload, seed=0))


def _sglang_gap() -> float:
    return 1e3 * statistics.median(_sglang(64).gaps)


def _sglang_throughput(batch_size: int) -> float:
    run = _sglang(batch_size)
    return sum(outcome.num_tokens for outcome in run.outcomes) / run.seconds


def _pass_ms(device: str, model: str, size: int, work: Work) -> float:
    """Of one pass, in milliseconds."""
    backend = SimulatedBackend(device)
    config = EngineConfig.from_arguments(model=str(MODELS / model), tensor_parallel_size=size)
    plan = EnginePlan.make(config, backend)
    seconds = backend.roofline(backend.num_devices).seconds(model_cost(plan.target), work).total
    return 1e3 * seconds


def _contexts(*lengths: int) -> np.ndarray:
    return np.array(lengths, np.int64)


def _optimum_gap() -> float:
    return _pass_ms("inf2:8", "llama-3.1-8b", 8, Work(32, 32, np.full(32, 4096, np.int64)))


# 10,000 tokens in and 1,500 out: about the middle of the answer.
_NXD_CONTEXT = 10_750


def _nxd_first_token() -> float:
    work = Work(10_000, 1, _contexts(), chunks=[(0, 10_000)])
    return _pass_ms("trn2:64", "llama-3.3-70b", 64, work) / 1e3


def _nxd_gap() -> float:
    return _pass_ms("trn2:64", "llama-3.3-70b", 64, Work(1, 1, _contexts(_NXD_CONTEXT)))


def _nxd_draft_gap() -> float:
    """A round verifies 7 tokens, six of which were drafted; the draft model is spread over all devices, as it was there."""
    target = _pass_ms("trn2:64", "llama-3.3-70b", 64, Work(7, 7, _contexts(_NXD_CONTEXT), 7))
    draft = _pass_ms("trn2:64", "llama-3.2-1b", 32, Work(1, 1, _contexts(_NXD_CONTEXT)))
    return (target + 6 * draft) / 7


def _rpa_share() -> float:
    """The bytes of the keys and values over what reading them takes, as a share of the bandwidth."""
    backend = SimulatedBackend("tpu7x:1")
    plan = EnginePlan.make(EngineConfig.from_arguments(model=str(MODELS / "llama-3.1-8b")), backend)
    cost = model_cost(plan.target)
    contexts = np.full(64, 4096, np.int64)
    seconds = backend.roofline(1).seconds(cost, Work(64, 64, contexts)).attention
    num_bytes = sum(count for _, count in cost.kv_bytes) * int(contexts.sum())
    return 100.0 * num_bytes / seconds / (backend.chip.hbm_gb_per_s * 1e9)
