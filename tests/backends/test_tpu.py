"""TPUs without a TPU: what the real compiler says of an engine's programs, and what is refused before anything is compiled."""

import importlib.util
import json
import subprocess
import sys

import pytest

from quire.backends.chips import chips
from quire.backends.tpu import TpuBackend
from quire.engine.config import EngineConfig
from quire.engine.planning import EnginePlan
from quire.kernels.errors import BackendError, InvalidConfigError
from quire.server.cli import main
from tests.engine.engines import tiny_folder

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is for Linux on x86-64 only"
)
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize("target", ["v5e", "v9z:2x2", "v5e:2", "v5e:axb", ""])
def test_a_target_that_is_none_is_refused_with_the_form(target: str) -> None:
    with pytest.raises(BackendError, match=r"is not of the form CHIP:AxB.*chips: v4, v5e"):
        TpuBackend(target)


def test_without_chips_the_backend_says_what_is_missing() -> None:
    with pytest.raises(BackendError, match=r"jax finds no TPU .* install 'quire\[tpu\]'"):
        TpuBackend()


@needs_compiler
@pytest.mark.parametrize("name", chips())
def test_every_chip_in_the_list_is_one_that_the_compiler_knows(name: str) -> None:
    target = f"{name}:{'1x1x1' if name in ('v4', 'v5p', 'tpu7x') else '1x1'}"
    assert TpuBackend(target).chip.name == name


@needs_compiler
def test_a_model_that_does_not_fit_is_refused_before_anything_is_compiled() -> None:
    folder = str(tiny_folder(**LLAMA_8B))
    backend = TpuBackend("v5e:1x1")
    with pytest.raises(InvalidConfigError, match=r"take 29\.9 GiB on each device as float32, and 15\.\d GiB"):
        EnginePlan.make(EngineConfig.from_arguments(model=folder, dtype="float32"), backend)
    with pytest.raises(InvalidConfigError, match=r"one request of max_model_len=8192 needs 128; lower max_model_len"):
        EnginePlan.make(EngineConfig.from_arguments(model=folder), backend)
    plan = EnginePlan.make(EngineConfig.from_arguments(model=folder, quantization="int8"), backend)
    assert 7 < plan.weight_bytes / 2**30 < 9


@needs_compiler
@pytest.mark.parametrize(("target", "settings"), [("v5e:1x1", []), ("v6e:2x2", ["--tensor-parallel-size", "2"])])
def test_compile_prints_what_memory_holds_and_writes_the_programs(target, settings, tmp_path, capsys) -> None:
    model = str(
        tiny_folder(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=128)
    )
    flags = ["--max-num-seqs", "8", "--max-model-len", "256", "--num-kv-blocks", "40", "--sampling", "greedy"]
    status = main(["compile", model, "--target", target, "--output", str(tmp_path), *flags, *settings])
    printed, told = capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    assert status == 0, printed
    assert "[1/" in told
    assert f"{report['num_kv_blocks']} blocks of {report['block_size']} tokens" in printed
    programs = report["programs"]
    assert len(programs) == len(list(tmp_path.glob("*.stablehlo.mlir"))) >= 4
    for program in programs:
        assert program["error"] is None
        assert program["cache_copies"] == 0, program["name"]
        # The donated state is given back in its place.
        assert program["alias_bytes"] >= 0.9 * program["output_bytes"]
        if program["name"] != "slot update":
            assert program["argument_bytes"] >= report["weight_bytes"] * 0.9
            assert bool(program["collectives"]) == (report["num_devices"] > 1)
    assert report["temp_bytes"] <= report["planned_temp_bytes"]


SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "size", "settings"),
    [
        ("v5e:1x1", 1, ["--sampling", "greedy"]),
        ("v5e:2x2", 4, ["--sampling", "random"]),
        ("v5e:1x1", 1, ["--decode-steps-per-dispatch", "2"]),
    ],
)
@pytest.mark.parametrize("method", ["draft_model", "ngram"])
def test_speculative_steps_compile_without_a_copy_of_either_cache(
    target: str, size: int, settings: list[str], method: str, tmp_path
) -> None:
    config = {"method": method, "num_speculative_tokens": 3, "adaptive": False}
    if method == "draft_model":
        config["model"] = str(tiny_folder(**{**SMALL, "hidden_size": 128, "num_hidden_layers": 1}))
    flags = ["--max-num-seqs", "8", "--max-model-len", "256", "--num-kv-blocks", "40", "--output", str(tmp_path)]
    speculation = ["--speculative-config", json.dumps(config), "--tensor-parallel-size", str(size)]
    command = [sys.executable, "-m", "quire.server.cli", "compile", str(tiny_folder(**SMALL)), "--target", target]
    # In a process of its own: the compiler for chips that are not here cannot read what a cache of programs holds.
    assert subprocess.run([*command, *flags, *speculation, *settings], check=False).returncode == 0
    report = json.loads((tmp_path / "report.json").read_text())
    names = [program["name"] for program in report["programs"]]
    assert any("of 3 drafts" in name for name in names)
    assert any("draft prefill" in name for name in names) == (method == "draft_model")
    for program in report["programs"]:
        assert program["error"] is None
        assert program["cache_copies"] == 0, program["name"]
        assert program["alias_bytes"] >= 0.9 * program["output_bytes"], program["name"]
    assert report["temp_bytes"] <= report["planned_temp_bytes"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("target", "size"), [("v5e:2x4", 8), ("v6e:2x2", 4)])
def test_eight_billion_parameters_compile_in_every_shape_without_a_copy(target: str, size: int, tmp_path) -> None:
    model = str(tiny_folder(**LLAMA_8B))
    command = [
        sys.executable,
        "-m",
        "quire.server.cli",
        "compile",
        model,
        "--target",
        target,
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["num_devices"] == size
    for program in report["programs"]:
        assert program["cache_copies"] == 0, program["name"]
        peak = program["argument_bytes"] + program["output_bytes"] - program["alias_bytes"] + program["temp_bytes"]
        assert peak <= report["hbm_bytes"], program["name"]
    assert report["temp_bytes"] <= report["planned_temp_bytes"]
