"""Programs through torch-neuronx, which is stood in for: the engine's tokens, what the stand-in refuses, and which runtime is chosen."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jaxlib
import numpy as np
import pytest

from quire.backends import neuron
from quire.backends.neff import NeffRuntime
from quire.backends.neuron_compiler import NeuronCompiler
from quire.backends.rank_program import rank_program
from quire.engine import LLM
from quire.kernels.errors import BackendError
from tests.backends.neuron_plugin import PARAMS, PROMPTS, SETTINGS
from tests.engine.engines import tiny_folder, token_ids

pytest.importorskip("torch", reason="torch is the currency of torch-neuronx, and is not installed")
from tests.backends import torch_neuronx_stand_in as stand_in

HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def expected() -> list[list[list[int]]]:
    llm = LLM(str(tiny_folder(**HEADS)), device="cpu", **SETTINGS)
    return token_ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False))


@pytest.mark.parametrize(
    ("num_cores", "settings"),
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        (2, {}),
        pytest.param(
            1, {"num_kv_blocks": 14, "block_size": 16, "decode_steps_per_dispatch": 2}, marks=pytest.mark.slow
        ),
        pytest.param(
            2,
            {"enable_prefix_caching": False, "async_scheduling": False, "sampling": "full"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one", "two", "one_small_cache", "two_synchronous"],
)
def test_the_engine_gives_the_tokens_of_the_cpu(num_cores: int, settings: dict, expected, tmp_path: Path) -> None:
    """Twice over, so that cached prefixes and state that was updated in place are read again."""
    command = tmp_path / "neuronx-cc"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("neuronx_cc.py")} "$@"\n')
    command.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NEURON")} | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "QUIRE_TEST_CALLS": str(tmp_path / "calls"),
        "QUIRE_CACHE": str(tmp_path / "cache"),
        "JAX_PLATFORMS": "cpu",
        "NEURON_PLATFORM_TARGET_OVERRIDE": "trn1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    arguments = [str(tiny_folder(**HEADS)), str(num_cores), json.dumps(settings)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.neff_engine", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["tokens"] == [expected, expected]
    assert said["runs"] > said["programs"]
    assert said["blocks"] == 0
    assert said["held"] > 0
    assert (said["prefix_hits"] > 0) == settings.get("enable_prefix_caching", True)
    compiled = len((tmp_path / "calls").read_text().splitlines())
    assert compiled == said["programs"], "each program is compiled once"


@pytest.fixture
def runtime(monkeypatch) -> NeffRuntime:
    """On the stand-in, one core; programs are compiled by nobody and run as they are."""
    monkeypatch.setenv("NEURON_RT_NUM_CORES", "1")
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "inf2")
    monkeypatch.setenv("NEURON_RT_IO_RING_CACHE_SIZE", "1")
    monkeypatch.setattr(NeuronCompiler, "compile", lambda self, program, name: b"NEFFinf2\0" + program.hlo)
    install(monkeypatch)
    return NeffRuntime(1, NeuronCompiler("inf2"))


def install(monkeypatch, **options) -> None:
    import torch

    monkeypatch.setitem(sys.modules, "torch_neuronx", ModuleType("torch_neuronx"))
    for place in (torch.ops, torch.classes):
        monkeypatch.setattr(place, "neuron", None, raising=False)
    monkeypatch.setattr(stand_in, "_state", SimpleNamespace(is_initialized=False))
    stand_in.install(**options)


def step(weights, state, sent):
    """Each of three kinds of argument, one of which is not used, in every dtype that a step has."""
    total, bits, flags = state
    del flags
    return (total + weights["w"].sum() + sent[0], bits ^ np.uint32(0xFFFF0000), sent[1] > 1), (total * 2, bits)


def arguments(runtime: NeffRuntime) -> tuple:
    mesh, whole = SimpleNamespace(size=1), jax.sharding.PartitionSpec()

    def held(values: np.ndarray):
        return runtime.put(mesh, whole, values.shape, values.dtype, values.__getitem__)

    weights = {"unused": held(np.zeros(3, np.float32)), "w": held(np.ones((2, 2), np.float32))}
    state = (held(np.float32([1, 2])), held(np.uint32([0xFFFFFFFF])), held(np.array([True, False])))
    return weights, state, (np.float32(3), np.int32([1, 2]))


def load(runtime: NeffRuntime, given: tuple):
    kinds = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), given)
    return runtime.load(jax.jit(step, donate_argnums=1, keep_unused=True).lower(*kinds))


def test_state_is_updated_in_place_and_results_are_those_of_the_call(runtime: NeffRuntime) -> None:
    weights, state, _ = given = arguments(runtime)
    program = load(runtime, given)
    first_state, first = program(*given)
    second_state, second = program(weights, first_state, (np.float32(10), np.int32([2, 0])))
    assert all(new is old for new, old in zip((*first_state, *second_state), (*state, *state), strict=True))
    np.testing.assert_array_equal(first[0], [2, 4])
    np.testing.assert_array_equal(first[1], np.uint32([0xFFFFFFFF]))
    np.testing.assert_array_equal(second[0], [16, 18])
    np.testing.assert_array_equal(second[1], np.uint32([0x0000FFFF]))
    assert second[1].dtype == np.uint32


def test_bits_are_the_same_on_both_sides(runtime: NeffRuntime) -> None:
    for dtype in (np.float32, np.int32, np.uint32, np.int8, np.bool_, jax.numpy.bfloat16):
        values = np.random.default_rng(0).integers(0, 100, (3, 5)).astype(dtype)
        back = runtime.to_numpy(runtime.to_torch(values), np.dtype(dtype))
        assert back.dtype == values.dtype
        np.testing.assert_array_equal(back, values)


def test_other_weights_than_those_that_are_bound_are_refused(runtime: NeffRuntime) -> None:
    given = arguments(runtime)
    program = load(runtime, given)
    program(*given)
    with pytest.raises(BackendError, match="other tensors than those it is bound to"):
        program(*arguments(runtime))


def test_what_goes_wrong_while_running_is_raised_where_it_is_read(runtime: NeffRuntime) -> None:
    given = arguments(runtime)
    program = load(runtime, given)
    program(*given)[1][0].block_until_ready()
    _, results = program(given[0], given[1], (np.float32(3), np.int32([1, 2, 3])))
    with pytest.raises(AssertionError, match="into"):
        np.asarray(results[0])


@pytest.mark.parametrize("name", ["_init_neuron", "_parallel_run_neuron"])
def test_a_name_that_torch_neuronx_lacks_is_said_at_the_start(name: str, monkeypatch) -> None:
    install(monkeypatch, without=name)
    with pytest.raises(BackendError, match=rf"lacks {name}, which are internal.*neuron_runtime=pjrt"):
        NeffRuntime(1, NeuronCompiler("inf2"))


def test_the_stand_in_refuses_misuse(runtime: NeffRuntime) -> None:
    """What it would let pass it could not prove."""
    lowered = jax.jit(lambda a, b: (a + 1, b.sum()), donate_argnums=0).lower(np.float32([1]), np.int32([1, 2]))
    program = rank_program(lowered)
    model = stand_in.ParallelModel(b"NEFFinf2\0" + program.hlo, 1, 0, 1)
    a, b, own = (runtime.upload([values]) for values in (np.float32([1]), np.int32([1, 2]), np.int32(0)))

    def run(inputs, outputs) -> None:
        stand_in._parallel_run_neuron(model, runtime.tensor_set("input", inputs), runtime.tensor_set("output", outputs))

    with pytest.raises(AssertionError, match="load comes first"):
        run([a, b], [a, own])
    model.load()
    run([a, b], [a, own])
    with pytest.raises(AssertionError, match="output0 is aliased to input0"):
        run([a, b], [runtime.upload([np.float32([1])]), own])
    with pytest.raises(AssertionError, match=r"input1 is \(1,\), not \(2,\)"):
        run([a, runtime.upload([np.int32([1])])], [a, own])
    with pytest.raises(AssertionError, match=r"input1 is torch.float32, not i32"):
        run([a, runtime.upload([np.float32([1, 2])])], [a, own])
    with pytest.raises(AssertionError, match="1 inputs bound, the program has 2"):
        run([a], [a, own])
    bound = stand_in.ParallelTensorSet(["input0", "input1"], 1)
    with pytest.raises(AssertionError, match="init comes first"):
        bound.add(0, a)
    bound.init()
    bound.add(0, a)
    with pytest.raises(AssertionError, match="input1 is not bound"):
        stand_in._parallel_run_neuron(model, bound, runtime.tensor_set("output", [a, own]))
    with pytest.raises(AssertionError, match="compiled for another chip"):
        stand_in.ParallelModel(b"NEFFtrn2\0" + program.hlo, 1, 0, 1)
    with pytest.raises(AssertionError):
        stand_in.ParallelModel(b"NEFFinf2\0" + program.hlo, 2, 0, 2)


class Plugin(ModuleType):
    """As much of AWS's plugin as is asked for: which jaxlib it lists."""

    def __init__(self, *versions: str) -> None:
        super().__init__("libneuronxla")
        self.supported_clients = lambda: [f"jaxlib {version} (PJRT C-API)" for version in versions]


@pytest.mark.parametrize(
    ("plugin", "has_torch", "wanted", "chosen"),
    [
        (Plugin(jaxlib.__version__), True, "auto", "pjrt"),
        (Plugin("0.1.0"), True, "auto", "neff"),
        (Plugin("0.1.0"), False, "auto", "pjrt"),
        (Plugin("0.1.0"), True, "pjrt", "pjrt"),
        (None, True, "auto", "neff"),
        (Plugin(jaxlib.__version__), True, "neff", "neff"),
    ],
)
def test_the_runtime_is_what_is_installed_and_said(plugin, has_torch, wanted, chosen, monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "libneuronxla", plugin)
    monkeypatch.setitem(sys.modules, "torch_neuronx", ModuleType("torch_neuronx") if has_torch else None)
    with caplog.at_level(logging.INFO):
        assert neuron._chosen_runtime(wanted) == chosen
    assert f"Neuron runtime: {chosen}" in caplog.text


@pytest.mark.parametrize(
    ("wanted", "reason"), [("auto", "pjrt: .*; neff: "), ("neff", "torch_neuronx"), ("pjrt", "libneuronxla")]
)
def test_a_runtime_that_is_not_installed_is_refused_with_the_reason(wanted: str, reason: str) -> None:
    with pytest.raises(BackendError, match=f"neuron_runtime='{wanted}' cannot be had: .*{reason}"):
        neuron._chosen_runtime(wanted)
