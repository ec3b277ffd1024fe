"""The command line, in the process: what it prints, what it refuses, and its exit status."""

import io
import json
import platform
import sys
from pathlib import Path

import pytest

from quire.server.cli import EXIT_USAGE, main


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_generate_completes_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _run(capsys, "generate", "--max-tokens", "8", "--prompt", "def fibonacci(n):")
    assert status == 0
    assert out.startswith("def fibonacci(n):")
    assert len(out.strip()) > len("def fibonacci(n):")


def test_json_has_an_object_a_line(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('import os\n\n{"prompt": "import re"}\n')
    status, out, _ = _run(capsys, "generate", "--json", "--max-tokens", "4", "--file", str(prompts))
    assert status == 0
    found = [json.loads(line) for line in out.splitlines()]
    assert [entry["prompt"] for entry in found] == ["import os", "import re"]
    assert all(len(entry["outputs"][0]["token_ids"]) == 4 for entry in found)
    status, text, _ = _run(capsys, "generate", "--max-tokens", "4", "--file", str(prompts))
    assert text == "".join(f"--- {i + 1}\n{e['prompt']}{e['outputs'][0]['text']}\n" for i, e in enumerate(found))


def test_standard_input_is_one_prompt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("import os\nimport"))
    _, out, _ = _run(capsys, "generate", "--max-tokens", "4")
    assert out.startswith("import os\nimport")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--temperature", "-1", "-p", "x"], "temperature must be"),
        (["--params", "[1]", "-p", "x"], "no JSON object"),
        (["--params", '{"foo": 1}', "-p", "x"], "unknown foo"),
        (["--params", '{"logit_bias": {"a": 1}}', "-p", "x"], "logit_bias"),
        (["--file", "/nonexistent/file"], "cannot be read"),
        (["def fibonacci(n):"], "quire generate --prompt 'def fibonacci(n):'"),
        (["--file", "a", "-p", "x"], "not both"),
        (["--device", "tpu", "-p", "x"], "cannot be used"),
        (["/nonexistent/folder", "-p", "x"], "/nonexistent/folder"),
        (["--max-model-len", "99999", "-p", "x"], "lower it to"),
        (["--kernels", "paged_attention=magic", "-p", "x"], "no implementation 'magic'"),
        (["--tensor-parallel-size", "2", "-p", "x"], "leave it at 1"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    status, out, err = _run(capsys, "generate", *arguments)
    assert status == EXIT_USAGE
    assert out == ""
    assert part in err
    assert "Traceback" not in err


def test_env_says_what_is_available_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _run(capsys, "env", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["backends"]["cpu"] == "available"
    assert report["backends"]["tpu"] != "available"
    assert report["versions"]["jax"]
    assert "LlamaForCausalLM" in report["architectures"]
    _, text, _ = _run(capsys, "env")
    assert "backends:" in text


def test_a_report_says_how_each_device_that_is_here_did(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = _run(capsys, "env", "--report", str(tmp_path / "report.json"))
    assert status == 0
    assert out == ""
    assert "look through it before you send it" in err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["trials"]["cpu"]["outcome"] == "ok"
    assert report["trials"]["cpu"]["text"].strip()
    assert "kernels: linear:" in report["trials"]["cpu"]["log"]
    assert report["Neuron"]["driver"]
    assert platform.node() not in json.dumps(report)


def test_the_offline_benchmark_prints_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--num-requests 6 --input-len 4-40 --output-len 2-8 --max-num-seqs 2 --sampling greedy --compare-batching"
    )
    status, out, _ = _run(capsys, "bench", "offline", *arguments.split())
    assert status == 0
    report = json.loads(out)
    assert report["recompilations"] == 0
    assert 0 < report["host_share"] < 1
    assert 0 <= report["padding_share"] < 1
    assert set(report["batching"]) == {"continuous", "windowed", "static"}
    for figures in report["batching"].values():
        assert figures["output_tokens_per_s"] > 0
        assert 0 <= figures["kv_waste_share"] < 1


def test_the_scheduler_benchmark_prints_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _run(capsys, "bench", "scheduler", "--num-running", "8", "--num-steps", "10")
    assert status == 0
    assert json.loads(out)["num_running"]["8"]["schedule_us"]["median"] > 0
