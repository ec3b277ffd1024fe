"""Laws of `quire bench serve` and `quire bench compare`: what is counted is what was sent, and noise is not called a difference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quire.bench.compare import compare
from quire.bench.serve import Record, Workload, keeps, parse_promise, percentiles, summarize
from quire.kernels.errors import InvalidConfigError
from tests.server.conftest import Server

COMMAND = [sys.executable, "-P", "-m", "quire.server.cli", "bench"]


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("load", [("--concurrency", 4), ("--request-rate", 50)])
def test_every_request_and_token_is_counted(server: Server, tmp_path: Path, load: tuple) -> None:
    before = server.metrics()
    flags = ("--num-requests", 12, "--input-len", "8-16", "--output-len", "4-9", "--warmup", 0, "--seed", 5, *load)
    done = bench("serve", "--url", server.url, *flags, "--output", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert report["completed"] == 12
    assert report["errors"] == {}
    workload = Workload.make(12, (8, 16), (4, 9), 1000, 0.0, 5)
    records = json.loads((tmp_path / "out.json").read_text())["records"]
    assert [record["num_output_tokens"] for record in records] == list(workload.output_lens)
    assert [record["num_prompt_tokens"] for record in records] == [len(prompt) for prompt in workload.prompts]
    made = server.metrics()["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    assert made == sum(workload.output_lens)
    for group in ("ttft_s", "itl_s", "e2e_s"):
        assert 0 < report[group]["p50"] <= report[group]["p95"] <= report[group]["p99"]
    assert report["ttft_s"]["p50"] <= report["e2e_s"]["p50"]
    assert 0 <= report["goodput"]["share"] <= 1
    server.wait_idle()


def test_requests_that_fail_are_errors_and_not_latencies(server: Server) -> None:
    done = bench("serve", "--url", server.url, "--num-requests", 3, "--input-len", "600-600", "--warmup", 0)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["completed"] == 0
    assert report["errors"] == {"400": 3}
    assert report["ttft_s"] == {}
    assert "max_model_len" in done.stderr


def test_goodput_counts_those_that_kept_all_of_the_promise() -> None:
    records = [
        Record(5, 3, ttft=0.5, e2e=1.0, inter_token=[0.2, 0.3]),
        Record(5, 3, ttft=2.5, e2e=3.0, inter_token=[0.2, 0.3]),
        Record(5, 3, ttft=0.5, e2e=2.5, inter_token=[0.8, 1.2]),
        Record(5, error="503"),
    ]
    promise = parse_promise("ttft=1,itl=0.25")
    assert [keeps(record, promise) for record in records[:3]] == [True, False, False]
    report = summarize(records, 2.0, promise)
    assert report["goodput"]["share"] == 0.25
    assert report["requests_per_s"] == 1.5
    assert report["output_tokens_per_s"] == 4.5
    assert report["errors"] == {"503": 1}


@pytest.mark.parametrize("text", ["", "ttft", "ttft=0", "ttft=-1", "latency=1", "ttft=nan", "ttft=1,,"])
def test_promise_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(InvalidConfigError, match="goodput"):
        parse_promise(text)


def report(scale: float, seed: int, count: int = 300) -> dict:
    """A benchmark's line with records of latencies about `scale`."""
    rng = np.random.default_rng(seed)
    times = (scale * rng.gamma(8.0, 1 / 8, (count, 5))).tolist()
    records = [{"ttft": t[0], "e2e": sum(t), "inter_token": t[1:], "error": None} for t in times]
    return {
        "seconds": 10.0,
        "output_tokens_per_s": 100 / scale,
        "ttft_s": percentiles([record["ttft"] for record in records]),
        "e2e_s": percentiles([record["e2e"] for record in records]),
        "records": records,
    }


def words(a: list[dict], b: list[dict]) -> dict[str, str]:
    return {verdict.name: verdict.word for verdict in compare(a, b)}


def test_slower_is_worse_faster_is_better_and_noise_is_neither() -> None:
    base = report(1.0, seed=1)
    assert words([base], [report(1.3, seed=2)])["ttft_s.p50"] == "worse"
    assert words([base], [report(0.7, seed=2)])["ttft_s.p50"] == "better"
    same = words([base], [report(1.0, seed=2)])
    assert same["ttft_s.p50"] == same["e2e_s.mean"] == "no difference"


def test_one_number_without_a_spread_is_judged_by_nobody() -> None:
    assert words([report(1.0, 1)], [report(2.0, 2)])["output_tokens_per_s"] == "single sample"


def test_repeats_give_any_metric_a_spread() -> None:
    a, b = ([report(scale * factor, 1) for factor in (0.99, 1.0, 1.01)] for scale in (1.0, 1.5))
    assert words(a, b)["output_tokens_per_s"] == "worse"
    assert words(b, a)["output_tokens_per_s"] == "better"
    assert words(a, a)["output_tokens_per_s"] == "no difference"


def test_compare_prints_the_spread_and_fails_where_it_is_asked_to(tmp_path: Path) -> None:
    for name, scale in (("a", 1.0), ("b", 1.4)):
        (tmp_path / name).write_text(json.dumps(report(scale, seed=3)) + "\n")
    done = bench("compare", tmp_path / "a", tmp_path / "b", "--fail-if-worse", 15)
    assert done.returncode == 1, done.stderr
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("ttft_s.p95")]
    assert "worse" in line
    assert ".." in line
    assert bench("compare", tmp_path / "b", tmp_path / "a", "--fail-if-worse", 15).returncode == 0
    assert bench("compare", tmp_path / "a", tmp_path / "nothing").returncode == 2
