"""`quire bench peers` from end to end, on the tiny shape, with the two engines that are always here."""

import json
import subprocess
from pathlib import Path

import pytest

from quire.bench.peers import environments
from quire.bench.peers.engines import PEERS, parse_arguments, quire_contender
from quire.kernels.errors import InvalidConfigError
from quire.server.cli import main

TINY = ["bench", "peers", "--shape", "tiny", "--quiet-limit", "0", "--rounds", "1", "--threads", "1"]


def test_engines_run_side_by_side_and_those_that_cannot_are_listed(tmp_path, capsys):
    output = tmp_path / "runs.jsonl"
    flags = ["--peers", "quire,transformers,vllm", "--cases", "decode-2,prefill-64,mixed-4,ready-warm,memory"]
    folders = ["--environments", str(tmp_path / "none"), "--work", str(tmp_path / "work"), "--output", str(output)]
    arguments = ["--quire-args", "sampling=greedy max_num_batched_tokens=64"]
    assert main([*TINY, *flags, *folders, *arguments]) == 0
    captured = capsys.readouterr()
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [json.loads(line) for line in captured.out.splitlines() if line.startswith("{")] == records
    quire = f"quire {arguments[1]}"
    found = {(r["engine"], r["case"]) for r in records if "value" in r}
    cases = ("decode-2", "prefill-64", "mixed-4", "ready-warm", "memory")
    assert found == {(engine, case) for engine in (quire, "transformers") for case in cases}, captured.err
    assert all(r["value"] > 0 for r in records if "value" in r)
    (missing,) = [r for r in records if "error" in r]
    assert missing["engine"] == "vllm"
    assert "--install" in missing["error"]
    assert "left out: vLLM: not installed" in captured.out
    assert f"{quire} / best peer" in captured.out
    # Both ran the same model: bfloat16 may turn a near tie.
    firsts = {r["engine"]: r["first_tokens"] for r in records if r["case"] == "mixed-4"}
    assert sum(a == b for a, b in zip(firsts[quire], firsts["transformers"], strict=True)) >= 3


def test_an_engine_that_cannot_load_is_listed_with_its_reason(tmp_path, capsys):
    flags = ["--peers", "quire", "--quire-args", "dtype=float99", "--cases", "decode-1"]
    assert main([*TINY, *flags, "--environments", str(tmp_path), "--work", str(tmp_path / "work")]) == 1
    assert "left out: quire dtype=float99: InvalidConfigError: dtype='float99'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--peers", "quire,tgi"], "unknown tgi"),
        (["--cases", "decode-many"], "is none of decode-N"),
        (["--rounds", "0"], "at least 1"),
        (["--chart", "/nonexistent/chart.png"], "/nonexistent is not a folder"),
        (["--quire-args", "dtype"], "not of the form name=value"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_started(flags, part, tmp_path, capsys):
    status = main([*TINY, *flags, "--environments", str(tmp_path), "--work", str(tmp_path / "work")])
    assert status == 2
    assert part in capsys.readouterr().err


def test_arguments_are_json_or_text():
    assert parse_arguments("dtype=bfloat16 max_num_seqs=8 enable_prefix_caching=false") == {
        "dtype": "bfloat16",
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
    }
    assert quire_contender(Path("m"), "quantization=int8").name == "quire quantization=int8"
    with pytest.raises(InvalidConfigError):
        parse_arguments("two words")


def test_every_peer_has_what_it_needs_to_be_installed_and_run():
    for name, peer in PEERS.items():
        assert set(environments.NEEDED.get(name, (name,))) <= set(environments.ENVIRONMENTS)
        assert peer.conversion is None or peer.conversion.environment in environments.ENVIRONMENTS


def test_environments_are_made_once_and_a_failure_is_told(tmp_path, monkeypatch, capsys):
    commands = []

    def fake(command, **_):
        commands.append(command)
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
            (Path(command[-1]) / "bin" / "python").touch()
        if any(part.startswith("gguf") for part in command):
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fake)
    failed = environments.install(["openvino", "llama.cpp"], tmp_path)
    assert list(failed) == ["llama.cpp"]
    assert "failed with status 1" in failed["llama.cpp"]
    assert environments.python_of("openvino", tmp_path) == tmp_path / "openvino" / "bin" / "python"
    assert environments.python_of("openvino-export", tmp_path) is not None
    assert environments.python_of("llama.cpp", tmp_path) is None
    commands.clear()
    assert environments.install(["openvino"], tmp_path) == {}
    assert commands == []
