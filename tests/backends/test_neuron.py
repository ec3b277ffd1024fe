"""NeuronCores without one: what is decided for them, what is refused, and an engine that takes every such decision on the CPU."""

import json
import os
import subprocess
import sys
from functools import cache
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest

from quire.backends.base import ShapeLimits, StepShape
from quire.backends.environment import neuron_devices, neuron_target, prepare_neuron
from quire.backends.neuron import NeuronBackend, NeuronOptions
from quire.backends.select import select_backend
from quire.engine import LLM
from quire.engine.config import EngineConfig
from quire.engine.planning import EnginePlan
from quire.kernels.errors import BackendError, InvalidConfigError
from quire.kernels.sampling.rows import SamplingMode
from quire.models.checkpoint import load_params, save_params
from quire.models.registry import load_config
from tests.backends.neuron_plugin import PARAMS, PROMPTS, SETTINGS
from tests.engine.engines import check_idle, tiny_folder, token_ids

DEFAULTS = ShapeLimits(32, 4, 4096, 32, 1)
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize("target", ["inf3", "inf2:0", "trn1:2x2", "v5e", ""])
def test_a_target_that_is_none_is_refused_with_the_form(target: str) -> None:
    with pytest.raises(BackendError, match=r"is not of the form CHIP or CHIP:DEVICES.*chips: inf2, trn1, trn2, trn3"):
        NeuronBackend.described(target)


@pytest.mark.parametrize(
    ("target", "logical_cores", "num_devices", "gib"),
    [("inf2", None, 2, 16), ("trn1:32", None, 32, 16), ("trn2", None, 4, 24), ("trn2", 1, 8, 12), ("trn3", 2, 4, 36)],
)
def test_a_chip_is_as_many_devices_as_its_cores_make(target, logical_cores, num_devices, gib) -> None:
    backend = NeuronBackend.described(target, logical_cores)
    assert backend.num_devices == num_devices
    assert backend.kv_cache_bytes(1.0, 0) == gib * 2**30


def test_logical_cores_that_a_chip_has_not_are_refused() -> None:
    with pytest.raises(BackendError, match="inf2 has no devices of 2 cores"):
        NeuronBackend.described("inf2", 2)


def test_few_programs_are_compiled_and_none_mixes() -> None:
    shapes = NeuronBackend.described("inf2").step_shapes(DEFAULTS)
    assert len(shapes) == len(set(shapes)) <= 16
    assert not any(shape.decode_rows and shape.prefill_tiles for shape in shapes)


@pytest.mark.parametrize("sampling", SamplingMode)
@pytest.mark.parametrize(("rows", "tiles"), [(1, 0), (5, 0), (32, 0), (0, 1), (0, 2), (0, 4)])
@pytest.mark.parametrize("blocks", [1, 33, 128])
def test_some_shape_covers_every_batch(sampling: SamplingMode, rows: int, tiles: int, blocks: int) -> None:
    need = StepShape(rows, tiles, 128, blocks, 1, sampling)
    assert any(shape.covers(need) for shape in NeuronBackend.described("trn1").step_shapes(DEFAULTS))


def test_a_model_that_does_not_fit_a_core_is_refused_before_anything_is_lowered() -> None:
    folder = str(tiny_folder(**LARGE))
    with pytest.raises(InvalidConfigError, match=r"on each device as float32, and 16\.0 GiB of it are free"):
        EnginePlan.make(
            EngineConfig.from_arguments(model=folder, dtype="float32", max_model_len=256),
            NeuronBackend.described("inf2"),
        )


def test_without_a_chip_the_driver_is_named_and_the_way_without_one() -> None:
    if neuron_devices():
        pytest.skip("this host has Neuron chips")
    with pytest.raises(BackendError, match=r"no chip \(/dev/neuron0\); --emulate inf2"):
        select_backend("neuron")


def test_emulation_on_another_device_is_refused() -> None:
    with pytest.raises(BackendError, match="emulate='inf2' stands for NeuronCores, and device 'tpu'"):
        select_backend("tpu", neuron=NeuronOptions(emulate="inf2"))


def test_chips_are_counted_and_named_by_what_the_host_says(tmp_path, monkeypatch) -> None:
    for name in ("neuron0", "neuron11", "neuron_core", "null"):
        (tmp_path / name).touch()
    assert neuron_devices(tmp_path) == 2
    monkeypatch.delenv("NEURON_PLATFORM_TARGET_OVERRIDE", raising=False)
    product = tmp_path / "product_name"
    assert neuron_target(product) is None
    for text, target in (
        ("inf2.8xlarge\n", "inf2"),
        ("trn1n.32xlarge", "trn1"),
        ("trn2u.48xlarge", "trn2"),
        ("m5.large", None),
    ):
        product.write_text(text)
        assert neuron_target(product) == target
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn3")
    assert neuron_target(product) == "trn3"


@pytest.fixture
def environment(monkeypatch) -> pytest.MonkeyPatch:
    """With a plugin, and without any setting of Neuron's; what is set meanwhile is taken back."""
    monkeypatch.setitem(sys.modules, "libneuronxla", ModuleType("libneuronxla"))
    for name in [name for name in os.environ if name.startswith("NEURON")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return monkeypatch


def test_what_the_user_has_set_stays(environment) -> None:
    os.environ.update(NEURON_RT_STOCHASTIC_ROUNDING_EN="1", NEURON_COMPILE_CACHE_URL="s3://bucket/cache")
    prepare_neuron(2, 1)
    assert os.environ["NEURON_RT_STOCHASTIC_ROUNDING_EN"] == "1"
    assert os.environ["NEURON_COMPILE_CACHE_URL"] == "s3://bucket/cache"
    assert os.environ["NEURON_RT_NUM_CORES"] == "2"
    assert os.environ["NEURON_LOGICAL_NC_CONFIG"] == "1"


def test_only_the_cores_that_are_used_are_taken_unless_they_are_named(environment) -> None:
    os.environ["NEURON_RT_VISIBLE_CORES"] = "4-7"
    prepare_neuron(2, None)
    assert "NEURON_RT_NUM_CORES" not in os.environ
    assert "NEURON_LOGICAL_NC_CONFIG" not in os.environ


def device(kind: str) -> SimpleNamespace:
    return SimpleNamespace(device_kind=kind, memory_stats=lambda: {"bytes_limit": 10 << 30, "bytes_in_use": 4 << 30})


@pytest.mark.parametrize(
    ("kind", "target", "chip"),
    [("NC_v2", None, "inf2"), ("NC_v2", "trn1", "trn1"), ("NC_v3d", None, "trn2"), ("NC_v4x", None, "trn3")],
)
def test_a_device_is_known_by_its_kind_or_its_instance(environment, kind, target, chip) -> None:
    if target is not None:
        os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"] = target
    environment.setattr(jax, "devices", lambda platform: [device(kind)] * 2)
    backend = NeuronBackend.attached(NeuronOptions(), 2)
    assert backend.chip.name == chip
    assert backend.kv_cache_bytes(0.5, 2 << 30) == 2 << 30, "half of what is free less what is reserved"


def test_a_device_of_an_unknown_kind_is_refused_with_what_to_set(environment) -> None:
    environment.setattr(jax, "devices", lambda platform: [device("NC_x")])
    with pytest.raises(
        BackendError, match="'NC_x' is a NeuronCore that quire does not know; set NEURON_PLATFORM_TARGET"
    ):
        NeuronBackend.attached(NeuronOptions(), 1)


class Stubborn:
    """A lowered program whose compiler gives up unless asked for less optimization."""

    def __init__(self, *, is_hopeless: bool = False) -> None:
        self.flags: list[str] = []
        self._is_hopeless = is_hopeless

    def compile(self) -> str:
        self.flags.append(os.environ["NEURON_CC_FLAGS"])
        if self._is_hopeless or "--optlevel=1" not in self.flags[-1]:
            raise jax.errors.JaxRuntimeError("INTERNAL: neuronx-cc: assertion failed")
        return "program"


def test_a_failed_compilation_is_tried_once_more_with_less_optimization(environment) -> None:
    environment.setattr(jax, "devices", lambda platform: [device("NC_v2")])
    os.environ["NEURON_CC_FLAGS"] = "--optlevel=3 --auto-cast=all"
    backend = NeuronBackend.attached(NeuronOptions(), 1)
    lowered = Stubborn()
    assert backend.compile(lowered) == "program"
    assert lowered.flags == [
        "--optlevel=3 --auto-cast=all --model-type=transformer",
        "--auto-cast=all --model-type=transformer --retry_failed_compilation --optlevel=1",
    ]
    assert os.environ["NEURON_CC_FLAGS"] == lowered.flags[0], "the next program starts afresh"
    with pytest.raises(jax.errors.JaxRuntimeError, match="assertion failed"):
        backend.compile(Stubborn(is_hopeless=True))


FAMILIES = {
    "llama": {},
    "windowed_and_full": {
        "architectures": ("Gemma2ForCausalLM",),
        "model_type": "gemma2",
        "sliding_window": 20,
        "query_pre_attn_scalar": 10,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "experts": {
        "architectures": ("Qwen3MoeForCausalLM",),
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": (),
    },
}


@cache
def tokens_of_the_cpu(folder: str) -> list[list[list[int]]]:
    llm = LLM(folder, device="cpu", **SETTINGS)
    return token_ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False))


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "llama")]
)
def test_the_emulated_engine_gives_the_tokens_of_the_cpu(family: str) -> None:
    """Scanned layers, separate rectangles, 128-token tiles and the reference kernels, against the CPU's own path."""
    folder = str(tiny_folder(**FAMILIES[family]))
    llm = LLM(folder, emulate="inf2", block_size=16, **SETTINGS)
    assert llm.core.capabilities.platform == "neuron"
    assert token_ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == tokens_of_the_cpu(folder)
    check_idle(llm)


@pytest.mark.parametrize("method", ["draft_model", pytest.param("ngram", marks=pytest.mark.slow)])
def test_an_emulated_engine_that_speculates_gives_the_tokens_of_the_cpu(method: str) -> None:
    """The draft model is the target's first layer."""
    folder = str(tiny_folder())
    config = {"method": method, "num_speculative_tokens": 2, "adaptive": False}
    config |= {"model": str(tiny_folder(num_hidden_layers=1))} if method == "draft_model" else {"prompt_lookup_min": 1}
    llm = LLM(folder, emulate="inf2", block_size=16, speculative_config=config, **SETTINGS)
    assert token_ids(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == tokens_of_the_cpu(folder)
    check_idle(llm)
    assert 0 < llm.stats().num_accepted_tokens < llm.stats().num_draft_tokens


@pytest.mark.parametrize("num_devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_engine_through_jaxs_plugin_gives_the_tokens_of_the_cpu(num_devices: int) -> None:
    """The plugin is stood in for by the CPU's client under its name; everything on this side of it is what runs on a device."""
    folder = str(tiny_folder(num_attention_heads=6, num_key_value_heads=2))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NEURON")} | {
        "JAX_PLATFORMS": "neuron,cpu",
        "NEURON_PLATFORM_TARGET_OVERRIDE": "trn1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, "-m", "tests.backends.neuron_plugin", folder, str(num_devices)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["tokens"] == tokens_of_the_cpu(folder)
    assert said["recompilations"] == 0
    assert (said["platform"], said["chip"], said["generator"]) == ("neuron", "trn1", "rbg")
    assert said["flags"] == "--model-type=transformer --auto-cast=none"
    assert said["cores"] == str(num_devices)
    assert said["held"] > 0, "what the engine's arrays take is not free"


def test_a_tied_embedding_is_held_twice_and_read_from_the_one_tensor(tmp_path) -> None:
    """Nothing is transposed in a step, and what is exported is what was loaded."""
    plan = EnginePlan.make(
        EngineConfig.from_arguments(model="demo", dtype="float32", max_model_len=256, emulate="inf2"),
        NeuronBackend.emulated(NeuronOptions(emulate="inf2")),
    )
    params = load_params(plan.target.folder, plan.model, np.float32, stacked=True)
    np.testing.assert_array_equal(params["lm_head"], params["embed_tokens"].T)
    assert plan.weight_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    save_params(params, plan.model, tmp_path, dtype=np.float32)
    again = load_params(tmp_path, load_config(plan.target.folder), np.float32, stacked=True)
    np.testing.assert_array_equal(again["embed_tokens"], params["embed_tokens"])
    assert "lm_head" not in again
