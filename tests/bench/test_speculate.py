"""Laws of `quire bench speculate`: forced drafts are accepted as often as asked for, differing tokens fail, and halves make a step."""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quire.bench.speculate.contenders import Contender, shared_engines
from quire.bench.speculate.forced import ForcedSample, seeds_of
from quire.bench.speculate.prompts import OPEN_ENDED, STRUCTURED, text_of
from quire.bench.speculate.report import BreakEven, break_even
from quire.bench.speculate.rounds import Case, Measurement, Serving, Workload, accepted_per_pos, equality
from quire.bench.speculate.unfused import timed_steps
from quire.engine import LLM
from quire.engine.speculation import SpeculativeConfig
from quire.engine.step_data import DraftRound
from quire.kernels.errors import InvalidConfigError
from quire.kernels.sampling.noise import seed_key
from quire.kernels.sampling.reference import sample
from quire.kernels.sampling.rows import SampleOutput, SamplingMode, SamplingRows
from quire.server.cli import main

VOCAB_SIZE = 512
NGRAM = {"method": "ngram", "num_speculative_tokens": 2}


def rows_of(seeds, num_positions: int) -> SamplingRows:
    keys = np.repeat(np.stack([seed_key(seed) for seed in seeds]), num_positions, axis=0)
    positions = np.tile(np.arange(num_positions, dtype=np.int32), len(seeds))
    return SamplingRows(temperature=jnp.zeros(len(keys)), key=jnp.asarray(keys), position=jnp.asarray(positions))


def tokens_of(forced: ForcedSample, rows: SamplingRows) -> np.ndarray:
    logits = jnp.zeros((rows.position.shape[0], VOCAB_SIZE), jnp.float32)
    return np.asarray(forced(logits, rows, mode=SamplingMode.RANDOM, num_logprobs=0).token_ids)


# ---- break-even


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({1: 1.5, 2: 1.2, 4: 1.1}, BreakEven(4.0, is_beyond=True)),
        ({1: 0.9, 2: 0.8}, BreakEven(None, is_beyond=False)),
        ({1: 1.5, 4: 0.5}, BreakEven(2.0, is_beyond=False)),  # half-way in log2
        ({8: 0.9, 1: 2.0, 2: 1.3}, BreakEven(2.0 * 4.0**0.75, is_beyond=False)),
        ({1: 1.0, 2: 0.5}, BreakEven(1.0, is_beyond=False)),
        ({1: 0.9, 2: 1.1, 4: 0.9}, BreakEven(2.0 * 2.0**0.5, is_beyond=False)),  # slower alone, as a small batch may be
    ],
)
def test_break_even_is_where_the_ratio_falls_below_one_for_good(ratios, expected):
    found = break_even(ratios)
    assert found.is_beyond == expected.is_beyond
    assert found.batch_size == pytest.approx(expected.batch_size)


# ---- who is measured on what


def test_every_number_of_drafts_has_an_engine_that_compiles_it():
    for counts in ([4], [1, 2, 4], [3, 4, 5, 8], [1, 2, 3, 4, 5, 6, 7]):
        groups = shared_engines(counts, 3)
        assert sorted(count for group in groups for count in group) == counts
        assert groups[0][-1] == max(counts)
        for group in groups:
            assert set(group) <= set(SpeculativeConfig("ngram", num_speculative_tokens=group[-1]).draft_counts(3))


@pytest.mark.parametrize("kind", [STRUCTURED, OPEN_ENDED])
def test_prompts_of_a_batch_differ(kind):
    assert len({text_of(kind, idx) for idx in range(64)}) == 64


def test_rounds_have_the_same_prompts_and_other_seeds():
    workload = Workload({"forced": [[3], [4], [5]]}, 4, acceptances=(0.5, 0.9))
    case = Case("forced", 2, 0.0, acceptance=0.9)
    prompts, first = workload.requests(case, 0)
    assert (prompts, workload.requests(case, 1)[0]) == ([[3], [4]], [[3], [4]])
    assert not {params.seed for params in first} & {params.seed for params in workload.requests(case, 1)[1]}
    assert workload.requests(case, 0) == (prompts, first)


# ---- forced acceptance


@pytest.mark.parametrize("acceptance_idx", [1, *(pytest.param(idx, marks=pytest.mark.slow) for idx in (0, 2, 3))])
def test_a_seed_decides_how_often_drafts_are_the_targets_tokens(acceptance_idx):
    acceptances = (0.0, 0.6, 0.95, 1.0)
    rows = rows_of(seeds_of(acceptance_idx, len(acceptances), 20), 500)
    target, draft = (tokens_of(ForcedSample(sample, acceptances, is_draft), rows) for is_draft in (False, True))
    wanted = acceptances[acceptance_idx]
    assert np.mean(target == draft) == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / 10_000) ** 0.5)
    assert target.min() >= 0
    assert draft.min() >= 0
    assert max(target.max(), draft.max()) < VOCAB_SIZE
    assert len(np.unique(target)) > VOCAB_SIZE / 2


def test_forced_tokens_cannot_be_had_without_sampling():
    """A sampler that gave a token that none gives would be heard: so no compiler may leave it out."""

    def silly(logits, rows, *, mode, num_logprobs, is_used):
        return SampleOutput(jnp.full(logits.shape[0], -7, jnp.int32))

    assert set(tokens_of(ForcedSample(silly, (0.5,), is_draft=True), rows_of([1], 8))) == {-7}

    def lowered(forced):
        return jax.jit(lambda logits, rows: forced(logits, rows, mode=SamplingMode.RANDOM, num_logprobs=0).token_ids)

    rows = rows_of([1], 8)
    compiled = lowered(ForcedSample(sample, (0.5,), is_draft=True)).lower(jnp.zeros((8, VOCAB_SIZE)), rows).compile()
    assert "f32[8,512]" in compiled.as_text()  # the logits are read


def test_a_position_is_accepted_in_a_share_of_the_rounds_that_drafted_it():
    rounds = [DraftRound(2, 2), DraftRound(2, 0), DraftRound(1, 1), DraftRound(1, 1)]
    assert accepted_per_pos(rounds) == [3 / 4, 1 / 2]
    assert accepted_per_pos([]) == []


# ---- equal tokens


def test_equality_counts_tokens_and_finds_the_first_that_differs():
    base = [[[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]]
    assert equality(base, base) == {"equal_share": 1.0, "first_difference": None}
    mine = [[[1, 2, 3], [4, 9, 6]], [[1, 2], [4, 5, 6]]]
    assert equality(mine, base) == {"equal_share": 10 / 12, "first_difference": [1, 1]}


def test_an_engine_that_gives_other_tokens_is_found_out():
    arguments = {"max_num_seqs": 1, "max_model_len": 32, "sampling": "greedy", "dtype": "float32"}
    plain = Contender("none", 0, LLM("demo", **arguments))
    other = LLM("demo-draft", speculative_config={"method": "ngram", "num_speculative_tokens": 1}, **arguments)
    workload = Workload({STRUCTURED: [[5, 6, 7]]}, 8)
    contenders = [plain, Contender("ngram", 1, other)]
    measurement = Measurement(Case(STRUCTURED, 1, 0.0), workload)
    measurement.measure(contenders, range(1), lambda _: None)
    records = measurement.records(contenders)
    assert [record["equal_share"] == 1.0 for record in records] == [True, False]
    assert records[1]["first_difference"] is not None


def test_a_contender_begins_to_learn_anew_with_each_set_of_engines():
    arguments = {"max_num_seqs": 1, "max_model_len": 64, "sampling": "greedy", "dtype": "float32"}
    begun = []

    class Watched(Contender):
        def new_experience(self):
            begun.append(super().new_experience())
            return begun[-1]

    adaptive = Watched("ngram", None, LLM("demo-draft", speculative_config=NGRAM, **arguments))
    measurement = Measurement(Case(STRUCTURED, 1, 0.0), Workload({STRUCTURED: [[5, 6, 7]]}, 40))
    for idx in range(2):
        measurement.measure(
            [Contender("none", 0, LLM("demo-draft", **arguments)), adaptive], range(idx, idx + 1), print
        )
    first, second = (experience.policy for experience in begun)
    assert first is not second
    assert first.cost(1, 0) is not None
    assert second.cost(1, 0) is not None
    (record,) = measurement.records([adaptive])
    assert (record["num_engines"], record["ratio"]["num_rounds"]) == (2, 2)


def test_turns_of_any_length_change_no_token_and_leave_the_device_idle():
    speculation = {"method": "ngram", "num_speculative_tokens": 2, "adaptive": False}
    llm = LLM("demo-draft", max_num_seqs=2, max_model_len=64, speculative_config=speculation, dtype="float32")
    requests = Workload({STRUCTURED: [[5, 6, 7], [8, 9]]}, 40).requests(Case(STRUCTURED, 2, 0.8), 0)
    at_once = Serving(llm, *requests).finish()
    for num_steps in (1, 5):
        serving = Serving(llm, *requests)
        num_turns = 0
        while not serving.is_measured:
            serving.take_turn(0.0, num_steps)
            num_turns += 1
            assert serving.is_measured or llm.core.drain() == []
        assert num_turns > 1
        run = serving.finish()
        assert (run.tokens, run.rounds) == (at_once.tokens, at_once.rounds)
        assert run.num_tokens == pytest.approx(at_once.num_tokens, abs=4), "those of a step more or less"


def test_a_pause_between_turns_is_in_no_steps_seconds(monkeypatch):
    llm = LLM("demo-draft", max_num_seqs=1, max_model_len=64, sampling="greedy", speculative_config=NGRAM)
    serving = Serving(llm, *Workload({STRUCTURED: [[5, 6, 7]]}, 40).requests(Case(STRUCTURED, 1, 0.0), 0))
    seen: list[float] = []
    policy = llm.core.scheduler.drafts.policy
    monkeypatch.setattr(policy, "observe_step", lambda num_rows, num_drafts, seconds, num_rounds: seen.append(seconds))
    begin = time.perf_counter()
    while not serving.is_measured:
        serving.take_turn(0.0, 4)
        time.sleep(0.05)
    num_pauses = len(seen) // 4
    assert num_pauses >= 5
    assert sum(seen) <= time.perf_counter() - begin - 0.05 * num_pauses


def test_too_few_rounds_to_time_both_ways_are_refused():
    speculation = {"method": "ngram", "num_speculative_tokens": 1}
    llm = LLM("demo-draft", max_num_seqs=1, max_model_len=32, sampling="greedy", speculative_config=speculation)
    requests = Workload({STRUCTURED: [[5, 6, 7]]}, 4).requests(Case(STRUCTURED, 1, 0.0), 0)
    with pytest.raises(InvalidConfigError, match="raise max_tokens"):
        timed_steps(llm, *requests, {}, begins_unfused=False)
    assert not llm.core.has_work


@pytest.mark.parametrize(("dtype", "status"), [("float32", 1), ("bfloat16", 0)])
def test_differing_tokens_fail_the_command_in_float32(tmp_path: Path, capsys, dtype, status):
    figure = {"median": 1.0, "low": 1.0, "high": 1.0, "num_rounds": 3}
    record = {
        "benchmark": "speculate",
        "model": "demo",
        "dtype": dtype,
        "kind": STRUCTURED,
        "batch_size": 4,
        "temperature": 0.0,
        "acceptance": None,
        "name": "ngram K=2",
        "method": "ngram",
        "num_drafts": 2,
        "other_load": None,
        "tokens_per_s": figure,
        "ratio": figure,
        "rounds": 9,
        "drafts_per_round": 2.0,
        "tokens_per_round": 2.0,
        "accepted_per_pos": [0.6, 0.4],
        "tokens_per_step": 2.0,
        "equal_share": 0.5,
        "first_difference": [3, 7],
    }
    (tmp_path / "lines").write_text(json.dumps(record) + "\n")
    assert main(["bench", "speculate", "--read", str(tmp_path / "lines")]) == status
    printed = capsys.readouterr()
    assert "token 7 of request 3" in printed.out
    assert ("speculation changed what is generated" in printed.err) == bool(status)


# ---- the command


def test_rounds_are_shared_out_among_engines_that_are_made_anew(capsys):
    flags = "--quick --methods ngram --batch-sizes 1 --temperatures 0.8 --kinds open-ended --rounds 3 --engines 2"
    assert main(["bench", "speculate", "--json", *flags.split()]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("starting demo, no speculation") == 4, "an engine and its control, twice"
    records = [json.loads(line) for line in captured.out.splitlines()]
    measured = [record for record in records if "ratio" in record]
    assert [record["name"] for record in measured] == ["none", "none again", "ngram K=2", "ngram adaptive"]
    for record in measured:
        assert (record["num_engines"], record["ratio"]["num_rounds"]) == (2, 3)
        assert record["equal_share"] == 1.0


@pytest.mark.parametrize("engines", [0, 4])
def test_more_engines_than_rounds_are_refused(engines, capsys):
    assert main(["bench", "speculate", "--quick", "--rounds", "3", "--engines", str(engines)]) != 0
    assert f"not be {engines}" in capsys.readouterr().err


@pytest.mark.parametrize("method", [pytest.param("draft_model", marks=pytest.mark.slow), "eagle3"])
def test_forced_drafts_are_accepted_as_often_as_asked_for_and_both_rounds_give_the_same_tokens(
    method: str, tmp_path: Path, capsys
):
    flags = f"--quick --acceptance 0.3 0.9 --methods {method} --batch-sizes 1 8 --max-tokens 48 --rounds 2 --unfused"
    command = ["bench", "speculate", "--json", *flags.split()]
    assert main([*command, "--plot", str(tmp_path / "forced.png")]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    fixed = [record for record in records if record["name"] == f"{method} K=2" and "ratio" in record]
    for record in fixed:
        if record["batch_size"] == 8:
            wanted = record["acceptance"]
            bound = 4 * (wanted * (1 - wanted) / record["rounds"]) ** 0.5
            assert record["accepted_per_pos"][0] == pytest.approx(wanted, abs=bound)
            assert record["rounds"] > 200
    assert all(record["equal_share"] == 1.0 for record in records if "equal_share" in record)
    unfused = [record for record in records if record.get("part") == "unfused"]
    assert [(record["batch_size"], record["acceptance"]) for record in unfused] == [(1, 0.3), (8, 0.3)]
    assert all(record["fused_ms"]["median"] > 0 and record["unfused_ms"]["median"] > 0 for record in unfused)
    assert (tmp_path / "forced.png").read_bytes().startswith(b"\x89PNG")


def test_text_is_measured_with_and_without_speculation(tmp_path: Path, capsys):
    flags = "--quick --methods ngram --kinds structured --temperatures 0"
    command = ["bench", "speculate", *flags.split()]
    assert main([*command, "--plot", str(tmp_path / "text.png")]) == 0
    table = capsys.readouterr().out
    for text in (
        "structured, temperature 0",
        "none again",
        "ngram K=2",
        "ngram adaptive",
        "batch size at which it breaks even",
    ):
        assert text in table
    assert (tmp_path / "text.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--acceptance 1.5", "a probability"),
        ("--acceptance 0.5 --methods ngram", "only the drafts of draft_model and eagle3 can be forced"),
        ("--batch-sizes 0 1", "batch_sizes must be at least 1"),
        ("--max-num-seqs 4", "max_num_seqs cannot be given"),
        ("--max-tokens 100000", "max_tokens=100000 after prompts of"),
        ("--max-tokens 100000 --acceptance 0.5 --shape tiny", "max_tokens=100000 after prompts of 32 tokens"),
        ("--plot /nowhere/at/all.png", "is not a folder"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(capsys, arguments, message):
    assert main(["bench", "speculate", *arguments.split()]) != 0
    assert message in capsys.readouterr().err
