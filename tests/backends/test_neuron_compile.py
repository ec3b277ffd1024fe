"""`quire compile` for NeuronCores: what it says without a compiler, and what it asks of one. AWS's is stood in for by neuronx_cc.py."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from jax.interpreters import mlir

from quire.backends.neuron import NeuronBackend
from quire.backends.neuron_compiler import NeuronCompiler, compile_slots, compiler_version, retried, with_defaults
from quire.backends.rank_program import RankProgram, rank_module
from quire.engine.config import EngineConfig
from quire.engine.planning import EnginePlan
from quire.kernels.errors import BackendError
from quire.server.cli import EXIT_USAGE, main
from tests.engine.engines import tiny_folder

FEW = ["--max-model-len", "128", "--sampling", "greedy", "--max-num-seqs", "4"]
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the stand-in on the path; gives the file of its calls."""
    command = tmp_path / "bin" / "neuronx-cc"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("neuronx_cc.py")} "$@"\n')
    command.chmod(0o755)
    calls = tmp_path / "calls"
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("QUIRE_TEST_CALLS", str(calls))
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    for name in ("NEURON_CC_FLAGS", "NEURON_COMPILE_CACHE_URL"):
        monkeypatch.delenv(name, raising=False)
    compiler_version.cache_clear()
    return calls


def calls_of(path: Path) -> list[list[str]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_without_a_compiler_every_program_is_lowered_and_looked_through(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    status = main(["compile", str(tiny_folder(**HEADS)), "--target", "inf2", "--output", str(tmp_path / "plan"), *FEW])
    captured = capsys.readouterr()
    assert status == 0
    assert "neuronx-cc is not on the path" in captured.err
    assert "2 device(s) of 16.00 GiB, bfloat16" in captured.out
    report = json.loads((tmp_path / "plan" / "report.json").read_text())
    assert not report["is_compiled"]
    assert all(program["instructions"] > 0 and program["errors"] == [] for program in report["programs"])
    steps = [program for program in report["programs"] if program["name"] != "slot update"]
    assert steps
    assert all({"all_reduce", "all_gather"} == program["collectives"].keys() for program in steps)
    names = {path.name.partition(".")[2] for path in (tmp_path / "plan").iterdir()}
    assert names == {"json", "stablehlo.mlir", "hlo.pb"}


def test_a_target_of_neither_kind_is_refused_with_the_chips_of_both(capsys) -> None:
    assert main(["compile", "--target", "inf9"]) == EXIT_USAGE
    said = capsys.readouterr().err
    assert "'inf9' names no chip" in said
    assert "v5e:2x4" in said
    assert "inf2, trn1, trn2, trn3" in said


def test_each_program_is_compiled_once_for_the_target(compiler: Path, capsys, tmp_path) -> None:
    arguments = ["compile", str(tiny_folder(**HEADS)), "--target", "trn2:2", "--json", *FEW]
    assert main([*arguments, "--output", str(tmp_path / "plan")]) == 0
    report = json.loads(capsys.readouterr().out)
    calls = calls_of(compiler)
    assert len(calls) == len(report["programs"])
    for call in calls:
        assert call[2:6] == ["--framework", "XLA", "--target", "trn2"]
        assert call[8:] == ["--model-type=transformer", "--auto-cast=none", "--logical-nc-config=2"]
    assert all(program["neff_bytes"] > 0 for program in report["programs"])
    assert len(list((tmp_path / "plan").glob("*.neff"))) == len(calls)
    assert main(arguments) == 0
    assert len(calls_of(compiler)) == len(calls), "what was compiled is kept"


def test_what_the_compiler_refuses_is_tried_again_and_then_told(compiler: Path, capsys, monkeypatch) -> None:
    arguments = ["compile", str(tiny_folder()), "--target", "inf2:1", *FEW]
    monkeypatch.setenv("QUIRE_TEST_FAIL", "optimized")
    assert main(arguments) == 0
    assert [call[-1] for call in calls_of(compiler)].count("--optlevel=1") == len(calls_of(compiler)) / 2
    monkeypatch.setenv("QUIRE_TEST_FAIL", "always")
    monkeypatch.setenv("NEURON_CC_FLAGS", "--optlevel=3")
    capsys.readouterr()
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "FAILED slot update: neuronx-cc does not compile slot update for inf2 (exit status 2" in out
    assert "NCC_EBVF030" in out


def test_a_program_that_breaks_a_rule_fails_with_its_line(compiler: Path, capsys, monkeypatch) -> None:
    """Integers multiplied as matrices: what the reference does with int8 weights elsewhere."""
    monkeypatch.setattr(NeuronBackend, "select_ops", _ops_of_the_cpu)
    assert main(["compile", str(tiny_folder()), "--target", "inf2:1", "--quantization", "int8", *FEW]) == 1
    out = capsys.readouterr().out
    assert "integer-dot" in out
    assert "kernels/linear/reference.py" in out


def _ops_of_the_cpu(self, config, dtype, quantization, block_size, tensor_parallel_size, wanted):
    from dataclasses import replace

    from quire.kernels.ops import choose_ops

    context = self.capabilities.op_context(config, dtype, quantization, block_size, tensor_parallel_size)
    return choose_ops(replace(context, platform="cpu"), wanted)


def test_a_rank_is_given_its_part_of_the_arguments_and_named_collectives() -> None:
    backend = NeuronBackend.described("inf2:2")
    settings = EngineConfig.from_arguments(
        model=str(tiny_folder(**HEADS)), max_model_len=128, sampling="greedy", tensor_parallel_size=2
    )
    plan = EnginePlan.make(settings, backend)
    source = plan.sources()[0]
    module = rank_module(source.lower(backend).compiler_ir("stablehlo"))
    assert module.operation.verify()
    text = str(module)
    assert "mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 2 : i32" in text
    assert "sdy." not in text
    assert "partition_id" not in text
    assert "channel_handle" not in text
    assert "stablehlo.replica_id" in text
    assert "replica_groups = dense<[[0, 1]]>" in text
    main_function = next(op for op in module.body.operations if op.attributes["sym_name"].value == "main")
    arguments = mlir.ir.ArrayAttr(main_function.operation.attributes["arg_attrs"])
    aliases = [mlir.ir.DictAttr(argument) for argument in arguments]
    places = [alias["tf.aliasing_output"].value for alias in aliases if len(alias)]
    num_changed = 3  # the cache, and of the slots the tokens and how many there are
    assert places == list(range(num_changed)), "each part of the state that the step changes takes its own place"
    head = plan.model.vocab_size // 2 + 1
    assert f"tensor<{plan.model.hidden_size}x{head}xbf16>" in text


def test_flags_of_the_user_stay_and_the_second_attempt_replaces_the_level() -> None:
    assert with_defaults(["--auto-cast=all"]) == ["--auto-cast=all", "--model-type=transformer"]
    assert retried(["-O3", "--auto-cast=none"]) == ["--auto-cast=none", "--retry_failed_compilation", "--optlevel=1"]
    assert retried(["--optlevel=2"]) == ["--retry_failed_compilation", "--optlevel=1"]


def test_compilations_at_once_are_as_many_as_memory_and_processors_allow() -> None:
    assert compile_slots(4 << 30, 8) == 1
    assert compile_slots(100 << 30, 8) == 8
    assert compile_slots(33 << 30, 8) == 4


def test_flags_of_the_layer_above_are_not_passed_on(tmp_path: Path) -> None:
    command = NeuronCompiler("inf2").command(
        tmp_path / "a", tmp_path / "b", ["--cache_dir=/x", "--no_cache", "--optlevel=1"]
    )
    assert command[9:] == ["--optlevel=1"]


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match="neuronx-cc is not on the path, and a step has to be compiled"):
        NeuronCompiler("inf2").compile(RankProgram(b"", "", 0, (), {}), "a step")


class InProcess(ModuleType):
    """libneuronxla as far as it is called: takes the documented arguments and nothing else, and keeps results and failures by their key."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__("libneuronxla")
        self.calls: list[dict] = []
        self._fails = fails
        self.neuron_xla_compile = self._compile

    def _compile(
        self,
        hlo_bytes,
        flags,
        *,
        input_format,
        platform_target,
        cache_key,
        retry_failed_compilation,
        lazy,
        use_cache,
        cache_dir,
    ):
        assert isinstance(hlo_bytes, bytes)
        assert input_format == "hlo"
        assert platform_target == "trn1"
        assert lazy
        self.calls.append(
            {"flags": flags, "key": cache_key, "retry": retry_failed_compilation, "cache": (use_cache, cache_dir)}
        )
        if self._fails and "--optlevel=1" not in flags:
            raise RuntimeError("Compilation failure:\n[NCC_EVRF007] too many instructions")
        return b"NEFF" + hlo_bytes


PROGRAM = RankProgram(b"hlo", "module @jit_step", 0, (), {})


def test_results_that_are_shared_through_s3_are_made_by_libneuronxla(compiler: Path, monkeypatch) -> None:
    package = InProcess()
    monkeypatch.setitem(sys.modules, "libneuronxla", package)
    assert NeuronCompiler("trn1", cache="s3://bucket/cache").compile(PROGRAM, "a step") == b"NEFFhlo"
    assert package.calls[0]["cache"] == (True, "s3://bucket/cache")
    assert package.calls[0]["flags"] == ["--model-type=transformer", "--auto-cast=none"]
    assert not package.calls[0]["retry"]
    assert calls_of(compiler) == []


def test_libneuronxla_is_asked_again_with_less_optimization(tmp_path: Path, monkeypatch) -> None:
    package = InProcess(fails=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "libneuronxla", package)
    assert NeuronCompiler("trn1", flags=("--optlevel=3",)).compile(PROGRAM, "a step") == b"NEFFhlo"
    first, second = package.calls
    assert (first["flags"], first["retry"], first["cache"]) == (["--optlevel=3"], False, (False, None))
    assert (second["flags"], second["retry"]) == (["--optlevel=1"], True)
    assert first["key"] != second["key"]
    with pytest.raises(BackendError, match=r"libneuronxla does not compile a step for inf2 .*assert"):
        NeuronCompiler("inf2").compile(PROGRAM, "a step")
