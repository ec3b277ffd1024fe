"""`quire plan`: workloads, the fleet's laws, the model beside what was published, and what the command prints."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.backends.roofline import read_efficiencies
from quire.bench.plan import validation
from quire.bench.plan.simulate import Result, Settings, largest_size, search, simulate
from quire.bench.plan.summary import table
from quire.bench.plan.workload import (
    PERCENTILES,
    GeneratedTraffic,
    Lengths,
    Promise,
    Spikes,
    Workload,
    built_in,
    load_workload,
    measured_acceptance,
    parse,
)
from quire.kernels.errors import InvalidConfigError
from quire.server.cli import main

P95 = PERCENTILES.index(95)
NGRAM = '{"method": "ngram", "num_speculative_tokens": 3}'
USERS = Workload(
    "small",
    "a few users",
    (100, 900),
    Lengths(most=80, median=20),
    Promise("first_token", 95, 0.5),
    users=60,
    duration_seconds=40.0,
    think_seconds=3.0,
    shared_prefix_tokens=64,
    spikes=Spikes(10.0, 20.0, 5.0, 4.0),
)


def run(device: str, workload: Workload = USERS, **changes: Any) -> Result:
    arguments = {"max_num_seqs": 64, **changes.pop("arguments", {})}
    return simulate(Settings("llama-3.1-8b", device, workload, arguments=arguments, **changes))


# ---- the model beside what was published


def test_the_model_is_near_what_was_published() -> None:
    """Within 5 %; and never are more factors fitted than there are results."""
    checked = validation.check()
    assert {each.row.chip: round(each.error, 3) for each in checked if abs(each.error) > 0.05} == {}
    efficiencies = read_efficiencies()
    for chip, each in efficiencies.items():
        assert len(each.fitted) <= sum(one.row.chip == chip for one in checked), chip
    text = validation.table(checked)
    assert all(one.row.what in text for one in checked)
    assert "trn1" in text.splitlines()[-1], "what is borrowed is said"


# ---- laws of the fleet


def test_every_request_is_answered_in_full() -> None:
    found = run("v6e:1")
    outcomes = found.run.outcomes
    assert len(outcomes) > 300
    assert all(outcome.is_done and outcome.num_tokens == outcome.arrival.max_tokens for outcome in outcomes)
    assert len(found.run.gaps) == sum(outcome.num_tokens - 1 for outcome in outcomes)
    for outcome in outcomes:
        assert outcome.first_token is not None
        assert outcome.arrival.time < outcome.first_token <= outcome.last_token <= found.run.seconds
        assert 0 <= outcome.queue_seconds < outcome.first_token - outcome.arrival.time
    assert 0 < found.summary.busy_share <= 1
    assert found.summary.kept(USERS.promise) is (found.summary.first_token[P95] <= 0.5)


def test_a_seed_says_everything() -> None:
    once, again, other = run("v5e:4"), run("v5e:4"), run("v5e:4", seed=1)
    ignored = {"host_ms_per_step", "wall_seconds"}

    def figures(result: Result) -> dict[str, Any]:
        return {name: value for name, value in result.summary.to_json().items() if name not in ignored}

    assert figures(once) == figures(again)
    assert once.run.gaps == again.run.gaps
    assert figures(once) != figures(other)


@pytest.mark.parametrize(
    "fleets",
    [
        [("v6e:1", 1), ("v6e:2", 2), ("v6e:4", 4)],
        [("v6e:1", 1), ("v6e:2", 1), ("v6e:4", 1)],
        [("inf2:2", 2), ("inf2:4", 2), ("inf2:8", 2)],
    ],
    ids=["larger engines", "more engines", "more engines of NeuronCores"],
)
def test_more_chips_never_worsen_the_tail(fleets: list[tuple[str, int]]) -> None:
    tails = [
        run(device, tensor_parallel_size=size, arguments={"max_num_seqs": 16}).summary.first_token[P95]
        for device, size in fleets
    ]
    assert tails == sorted(tails, reverse=True)
    assert tails[-1] < tails[0]


def test_policies_differ_as_they_are_known_to() -> None:
    """A batch that nobody joins makes people wait; a window makes them wait a little."""
    by_policy = {policy: run("v6e:1", policy=policy).summary for policy in ("continuous", "windowed", "static")}
    assert by_policy["continuous"].queue[0] < by_policy["windowed"].queue[0] < by_policy["static"].queue[0]
    assert by_policy["static"].padding_share > by_policy["continuous"].padding_share
    text = table(list(by_policy.values()), USERS)
    assert all(policy in text.splitlines()[0] for policy in by_policy)


def test_engines_that_share_the_load_get_alike_much_of_it() -> None:
    found = run("v6e:4", tensor_parallel_size=1)
    counts = np.bincount([outcome.replica for outcome in found.run.outcomes], minlength=4)
    assert counts.min() > 0.5 * counts.max()


# ---- workloads


def test_users_write_more_often_in_spikes() -> None:
    workload = dataclasses.replace(USERS, users=2000, think_seconds=100.0)
    times = [arrival.time for arrival in GeneratedTraffic(workload, 0).initial()]
    spikes = workload.spikes
    assert spikes is not None
    inside = sum(spikes.factor_at(time) > 1 for time in times)
    # 10 of 40 seconds, four times as often as in the other 30.
    assert inside / len(times) == pytest.approx(40 / 70, abs=0.06)


def test_lengths_are_what_they_are_said_to_be() -> None:
    random = np.random.default_rng(0)
    drawn = [Lengths(most=400, median=100, sigma=0.6).draw(random) for _ in range(4000)]
    assert np.median(drawn) == pytest.approx(100, rel=0.05)
    assert max(drawn) <= 400
    assert math.log(np.percentile(drawn, 84) / np.median(drawn)) == pytest.approx(0.6, rel=0.1)
    even = [Lengths(most=200, least=50).draw(random) for _ in range(4000)]
    assert (min(even), max(even)) == (50, 200)


def test_prompts_share_their_beginning_and_nothing_else() -> None:
    first, second = (arrival.prompt for arrival in GeneratedTraffic(USERS, 0).initial()[:2])
    assert first[:64] == second[:64]
    assert first[64:96] != second[64:96]
    assert all(100 <= len(arrival.prompt) <= 900 for arrival in GeneratedTraffic(USERS, 3).initial())


@pytest.mark.parametrize("name", built_in())
def test_the_workloads_that_come_with_quire_run(name: str) -> None:
    workload = load_workload(name)
    short = dataclasses.replace(workload, duration_seconds=4.0, documents=workload.documents and 6)
    found = run("v6e:8", short)
    assert found.summary.num_unfinished == 0
    assert found.summary.num_requests > 0
    assert workload.title in workload.describe()


def test_a_recorded_log_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "monday.jsonl"
    rows = [(1700000005.0, 50, 7), (1700000000.0, 300, 12), (1700000009.5, 20, 3)]
    path.write_text(
        "\n".join(json.dumps({"timestamp": t, "prompt_tokens": p, "completion_tokens": c}) for t, p, c in rows)
    )
    found = run("v6e:1", load_workload(str(path)))
    assert [(round(one.arrival.time, 3), len(one.arrival.prompt), one.num_tokens) for one in found.run.outcomes] == [
        (0.0, 300, 12),
        (5.0, 50, 7),
        (9.5, 20, 3),
    ]


def test_acceptance_is_taken_from_what_the_benchmark_measured(tmp_path: Path) -> None:
    """Shares there are of all rounds that drafted so far, here of what came to be tested; records of one K are put together."""
    path = tmp_path / "speculate.json"
    records = [
        {"method": "ngram", "num_drafts": 2, "rounds": 99, "accepted_per_pos": [0.1, 0.1]},
        {"method": "ngram", "num_drafts": 3, "rounds": 10, "accepted_per_pos": [0.8, 0.4, 0.1]},
        {"method": "ngram", "num_drafts": 3, "rounds": 30, "accepted_per_pos": [0.4, 0.4, 0.1]},
        {"method": "ngram", "num_drafts": None, "rounds": 30, "accepted_per_pos": [0.9]},
        {"method": "draft_model", "num_drafts": 3, "rounds": 30, "accepted_per_pos": [0.9, 0.9, 0.9]},
        {"part": "break_even", "name": "ngram K=3"},
    ]
    path.write_text("\n".join(json.dumps(record) for record in records))
    assert measured_acceptance(path, "ngram") == pytest.approx((0.5, 0.8, 0.25))
    with pytest.raises(InvalidConfigError, match="no record of eagle3"):
        measured_acceptance(path, "eagle3")
    workload = tmp_path / "mine.json"
    workload.write_text(json.dumps(ENTRY | {"duration_seconds": 5}))
    flags = ["--device", "v6e:1", "--workload", str(workload), "--max-num-seqs", "16", "--speculative-config", NGRAM]
    assert main(["plan", *flags, "--acceptance-file", str(path)]) == 0


ENTRY: dict[str, Any] = {
    "users": 5,
    "think_seconds": 2,
    "prompt_tokens": [10, 20],
    "output_tokens": {"most": 5},
    "promise": {"metric": "first_token", "seconds": 1},
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"userz": 4}, "unknown userz"),
        ({"documents": 4}, "give one of users, documents and requests_per_s"),
        ({"users": None}, "give one of users, documents and requests_per_s"),
        ({"think_seconds": 0}, "think_seconds of users must be above 0"),
        ({"prompt_tokens": [30, 20]}, "fewest and most"),
        ({"users": 0}, "users must be above 0, not 0"),
        ({"users": None, "requests_per_s": 0}, "requests_per_s must be above 0"),
        ({"output_tokens": {"most": 0}}, "output_tokens are at least 1"),
        ({"spikes": {"first": 0, "every": 0, "lasts": 1, "factor": 2}}, "spikes every must be above 0"),
        ({"promise": {"metric": "luck"}}, "'luck' is not one of first_token"),
        ({"promise": {"metric": "first_token", "percentile": 90}}, "percentile 90 is not one of 50, 95, 99"),
    ],
)
def test_a_workload_that_makes_no_sense_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidConfigError, match=says):
        parse("mine", {**ENTRY, **changes})


def test_a_file_that_is_no_workload_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{")
    for name, says in ((str(path), "does not describe a workload"), ("nothing", "neither one of chat")):
        with pytest.raises(InvalidConfigError, match=says):
            load_workload(name)


# ---- search, and the command


def test_the_cheapest_fleet_that_keeps_the_promise_is_found() -> None:
    settings = Settings("llama-3.1-8b", "", dataclasses.replace(USERS, users=150))
    said: list[str] = []
    found, tried = search(settings, ["v6e", "inf2"], said.append)
    assert found is not None
    assert found.summary.kept(USERS.promise)
    price = found.summary.fleet.usd_per_hour
    prices = [each.summary.fleet.usd_per_hour for each in tried]
    assert prices == sorted(prices)
    assert all(each.summary.kept(USERS.promise) is False for each in tried if each.summary.fleet.usd_per_hour < price)
    assert len(said) == len(tried)


def test_an_engine_takes_as_many_devices_as_can_share_the_model() -> None:
    assert largest_size("llama-3.1-8b", 8) == 8
    assert largest_size("llama-3.2-1b", 64) == 32
    assert largest_size("qwen3-30b-a3b", 24) == 8


def test_the_command_prints_draws_and_says_whether_the_promise_is_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="charts need it")
    workload, picture = tmp_path / "mine.json", tmp_path / "plan.png"
    workload.write_text(json.dumps(ENTRY | {"duration_seconds": 10}))
    common = ["plan", "--device", "v6e:1", "--workload", str(workload), "--max-num-seqs", "16"]
    assert main([*common, "--policies", "continuous", "static", "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "first token p95 under 1 s" in printed
    assert "simulated v6e:1" in printed
    assert printed.count("kept") == 2
    assert picture.stat().st_size > 10_000
    assert main([*common, "--json"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert record["kept"] is True
    assert record["first_token_p95"] < 1
    baseline = tmp_path / "last.json"
    baseline.write_text(json.dumps({**record, "first_token_p95": 1e-6}))
    workload.write_text(json.dumps(ENTRY | {"duration_seconds": 10, "promise": {"metric": "baseline", "times": 1.15}}))
    assert main([*common, "--baseline", str(baseline)]) == 1
    assert "BROKEN" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--device", "v7:8"], "is not of the form CHIP or CHIP:DEVICES"),
        (["--acceptance", "1.5", "--speculative-config", NGRAM], "acceptance is a share"),
        (["--acceptance", "0.5"], "there are none without --speculative-config"),
        (
            ["--acceptance-file", "/nowhere", "--speculative-config", NGRAM],
            "does not hold JSON lines of quire bench speculate",
        ),
        (["--duration", "0"], "duration must be above 0"),
        (["--seed", "-1"], "seed must be at least 0"),
        (
            ["--search", "--device", "v5e:8", "--max-num-seqs", "8"],
            "device, max_num_seqs cannot be given with --search",
        ),
        (["--search", "--policies", "continuous", "static"], "--search is for one policy"),
        (["--validate", "--efficiency-file", "mine.json"], "efficiency_file cannot be given with --validate"),
        (["--device", "v5e:8", "--tensor-parallel-size", "3"], "does not divide the 8 devices"),
        (["--device", "v5e:1", "--model", "llama-3.3-70b"], "spread the model over more devices"),
        (["--search", "--search-chips", "tpu7x"], "no public price"),
        (["--search", "--workload", "load-test"], "is none to search for"),
        (["--workload", "lunch"], "neither one of chat"),
        (
            ["--baseline", "/nowhere", "--workload", "documents", "--device", "v6e:8"],
            "does not hold JSON lines of quire plan",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags]) == 2
    assert says in capsys.readouterr().err
