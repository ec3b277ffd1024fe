"""Every step of every architecture, lowered with the kernels that a NeuronCore has without NKI, passes the linter for Neuron."""

import functools
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quire.backends.base import StepShape
from quire.backends.neuron import NeuronBackend
from quire.backends.stablehlo_lint import LintReport, lint
from quire.engine.config import EngineConfig
from quire.engine.planning import EnginePlan
from quire.engine.programs import ProgramSource, step_source
from quire.kernels.op import OpContext
from quire.kernels.ops import Ops, choose_ops
from quire.kernels.sampling.rows import SampleOutput, SamplingMode
from quire.models.config import ModelConfig
from quire.models.parallel import MODEL_AXIS
from tests.engine.engines import FewShapesBackend
from tests.models.heads import PUBLISHED, Head, write_head
from tests.models.tiny import TINY

ROWS, TILES, TILE, BLOCKS = 3, 2, 8, 10
SHAPES = {
    "greedy": StepShape(ROWS, 0, TILE, BLOCKS),
    "random": StepShape(ROWS, 0, TILE, BLOCKS, sampling=SamplingMode.RANDOM),
    "full": StepShape(ROWS, 0, TILE, BLOCKS, sampling=SamplingMode.FULL),
    "one row": StepShape(1, 0, TILE, BLOCKS),
    "several steps": StepShape(ROWS, 0, TILE, BLOCKS, 3, SamplingMode.RANDOM),
    "several full steps": StepShape(ROWS, 0, TILE, BLOCKS, 2, SamplingMode.FULL),
    "prefill": StepShape(0, TILES, TILE, BLOCKS),
    "mixed": StepShape(ROWS, TILES, TILE, BLOCKS),
    "mixed, prompt logprobs": StepShape(ROWS, TILES, TILE, BLOCKS, 1, SamplingMode.FULL, True),
}

DRAFTING = {
    "greedy drafts": StepShape(ROWS, 0, TILE, BLOCKS, num_drafts=3),
    "random drafts": StepShape(ROWS, 0, TILE, BLOCKS, sampling=SamplingMode.RANDOM, num_drafts=2),
    "full drafts": StepShape(ROWS, 0, TILE, BLOCKS, sampling=SamplingMode.FULL, num_drafts=2),
    "one row of drafts": StepShape(1, 0, TILE, BLOCKS, num_drafts=1),
    "several rounds": StepShape(ROWS, 0, TILE, BLOCKS, 3, SamplingMode.RANDOM, num_drafts=2),
    "several full rounds": StepShape(ROWS, 0, TILE, BLOCKS, 2, SamplingMode.FULL, num_drafts=3),
}
CATCH_UP = {
    "catching up": StepShape(0, TILES, TILE, BLOCKS, is_catch_up=True),
    "catching up by a tile": StepShape(0, 1, TILE, BLOCKS, is_catch_up=True),
}


class NeuronLikeBackend(FewShapesBackend):
    """Lowers what a NeuronCore is given, for devices that are not here."""

    def make_mesh(self, tensor_parallel_size: int) -> Any:
        return AbstractMesh((tensor_parallel_size,), (MODEL_AXIS,))

    def select_ops(
        self,
        config: ModelConfig,
        dtype: str,
        quantization: str,
        block_size: int,
        tensor_parallel_size: int,
        wanted: dict[str, str] | None,
    ) -> Ops:
        context = OpContext(
            platform="neuron",
            device_kind="NC_v2",
            dtype=dtype,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=block_size,
            num_devices=tensor_parallel_size,
            quantization=quantization,
            scan_layers=self.capabilities.scan_layers,
            has_experts=config.moe is not None,
        )
        references = {"write_kv": "reference", "paged_attention": "reference"}
        return choose_ops(context, {**references, **(wanted or {})})

    def lower(self, program: Any, arguments: Sequence[Any], donate: Sequence[int]) -> Any:
        traced = jax.jit(program, donate_argnums=tuple(donate)).trace(*arguments)
        return traced.lower(lowering_platforms=("cpu",))


@functools.cache
def folder_of(name: str, num_devices: int) -> str:
    """The tiny model's config.json, with heads that two devices can share where there are two."""
    config = TINY[name]()
    if num_devices > 1:
        config.num_attention_heads, config.num_key_value_heads = 6, 2
    if num_devices > 1 and name == "phi3-longrope":
        config.hidden_size = 96  # its frequencies are for heads of 16
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    folder = Path(tempfile.mkdtemp(prefix="quire-lint-"))
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return str(folder)


@functools.cache
def plan_of(name: str, num_devices: int, scan_layers: bool, **settings: Any) -> EnginePlan:
    backend = NeuronLikeBackend(scan_layers=scan_layers, tile_size=TILE)
    if scan_layers:  # a bfloat16 cache is held as such where it is not XLA:CPU that updates it
        backend.capabilities = replace(backend.capabilities, cache_bits_dtype={})
    arguments = {"max_num_seqs": 4, "max_model_len": 160, "num_kv_blocks": 20, "dtype": "bfloat16", **settings}
    folder = folder_of(name, num_devices)
    return EnginePlan.make(
        EngineConfig.from_arguments(model=folder, tensor_parallel_size=num_devices, **arguments), backend
    )


def source_of(plan: EnginePlan, shape: StepShape) -> ProgramSource:
    """The step of a shape that the backend does not list."""
    return step_source(plan.step_config, shape, plan.abstract_weights(), plan.abstract_state(), plan.mesh)


def report_of(plan: EnginePlan, shape: StepShape) -> LintReport:
    return lint(source_of(plan, shape).lower(plan.backend))


def assert_legal(plan: EnginePlan, shape: StepShape) -> None:
    report = report_of(plan, shape)
    assert [finding.describe() for finding in report.findings] == []
    assert report.instructions > 0


def cases(names: Sequence[str], shapes: Sequence[str], devices: Sequence[int], scans: Sequence[bool]) -> Iterator[Any]:
    for name in names:
        for shape in shapes:
            for num_devices in devices:
                for scan_layers in scans:
                    spread = f"{num_devices}-{'scanned' if scan_layers else 'unrolled'}"
                    yield pytest.param(name, shape, num_devices, scan_layers, id=f"{name}-{shape}-{spread}")


EVERYTHING = list(cases(list(TINY), list(SHAPES), (1, 2), (True, False)))
# What differs between steps is the same for all models, and what differs between models is in every step.
FEW = [
    *cases(["llama"], list(SHAPES), (1, 2), (True,)),
    *cases(["llama"], ["several full steps", "mixed, prompt logprobs"], (2,), (False,)),
    *cases([name for name in TINY if name != "llama"], ["mixed"], (2,), (True,)),
    *cases([name for name in TINY if name != "llama"], ["greedy"], (1,), (False,)),
]


@pytest.mark.parametrize(("name", "shape", "num_devices", "scan_layers"), FEW)
def test_a_step_holds_nothing_that_neuron_lacks(name: str, shape: str, num_devices: int, scan_layers: bool) -> None:
    assert_legal(plan_of(name, num_devices, scan_layers), SHAPES[shape])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape", "num_devices", "scan_layers"), EVERYTHING)
def test_every_step_holds_nothing_that_neuron_lacks(name: str, shape: str, num_devices: int, scan_layers: bool) -> None:
    assert_legal(plan_of(name, num_devices, scan_layers), SHAPES[shape])


def drafting_config(draft: str, num_devices: int) -> str:
    """`draft` is one of the tiny models, or ngram."""
    if draft == "ngram":
        return json.dumps({"method": "ngram"})
    if draft == "eagle3":
        return json.dumps({"method": "eagle3", "model": head_folder(num_devices)})
    return json.dumps({"method": "draft_model", "model": folder_of(draft, num_devices)})


@functools.cache
def head_folder(num_devices: int) -> str:
    """A head for the tiny llama, whose heads two devices can share where there are two."""
    pytest.importorskip("torch", reason="heads on disk are made with torch")
    layers = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2} if num_devices > 1 else {}
    folder = Path(tempfile.mkdtemp(prefix="quire-lint-head-"))
    write_head(Head(PUBLISHED | layers | heads), folder, seed=0)
    return str(folder)


def drafting_plan(name: str, draft: str, num_devices: int, scan_layers: bool) -> EnginePlan:
    return plan_of(name, num_devices, scan_layers, speculative_config=drafting_config(draft, num_devices))


def drafting_cases(pairs: Sequence[tuple[str, str]], devices: Sequence[int], scans: Sequence[bool]) -> Iterator[Any]:
    for name, draft in pairs:
        # A head reads what the target computes in every step, drafts or not.
        shapes = {"ngram": DRAFTING, "eagle3": {**DRAFTING, **SHAPES}}.get(draft, {**DRAFTING, **CATCH_UP})
        for name_, shape, num_devices, scan_layers in (
            case.values for case in cases([name], list(shapes), devices, scans)
        ):
            spread = f"{num_devices}-{'scanned' if scan_layers else 'unrolled'}"
            yield pytest.param(name_, draft, shape, num_devices, scan_layers, id=f"{name}-{draft}-{shape}-{spread}")


@pytest.mark.parametrize(
    ("name", "draft", "shape", "num_devices", "scan_layers"),
    [
        *drafting_cases([("llama", "qwen2"), ("llama", "ngram")], (1,), (True,)),
        *drafting_cases([("llama", "qwen2")], (2,), (True,)),
        pytest.param("llama", "eagle3", "random drafts", 1, True),
        pytest.param("llama", "eagle3", "mixed", 1, True),
    ],
)
def test_a_speculative_step_holds_nothing_that_neuron_lacks(
    name: str, draft: str, shape: str, num_devices: int, scan_layers: bool
) -> None:
    assert_legal(drafting_plan(name, draft, num_devices, scan_layers), (SHAPES | DRAFTING | CATCH_UP)[shape])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "draft", "shape", "num_devices", "scan_layers"),
    list(
        drafting_cases(
            [("llama", name) for name in (*TINY, "eagle3")] + [(name, "ngram") for name in TINY], (1, 2), (True, False)
        )
    ),
)
def test_every_speculative_step_holds_nothing_that_neuron_lacks(
    name: str, draft: str, shape: str, num_devices: int, scan_layers: bool
) -> None:
    assert_legal(drafting_plan(name, draft, num_devices, scan_layers), (SHAPES | DRAFTING | CATCH_UP)[shape])


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
def test_int8_weights_are_multiplied_as_floats(name: str, num_devices: int) -> None:
    plan = plan_of(name, num_devices, True, quantization="int8")
    assert plan.ops.linear.name == "weight_only"
    assert_legal(plan, SHAPES["mixed"])


@pytest.mark.parametrize("num_devices", [1, 2])
def test_giving_a_slot_to_a_request_holds_nothing_that_neuron_lacks(num_devices: int) -> None:
    plan = plan_of("llama", num_devices, True)
    source = plan.sources()[-1]
    assert source.shape is None
    assert lint(source.lower(plan.backend)).findings == ()


def test_more_steps_and_more_layers_are_more_instructions() -> None:
    plan = plan_of("llama", 1, True)
    one, several = (report_of(plan, SHAPES[shape]).instructions for shape in ("random", "several steps"))
    assert 2.5 * one < several < 3.5 * one


def test_a_step_with_an_illegal_sampler_is_found() -> None:
    """The same step with numpy's way to find the largest logit."""
    plan = plan_of("llama", 1, True)

    def sample(logits: jax.Array, rows: Any, **_: Any) -> Any:
        return SampleOutput(jax.numpy.argmax(logits, axis=1).astype(jax.numpy.int32))

    ops = replace(plan.ops, sample=replace(plan.ops.sample, function=sample))
    naive = replace(plan, target=replace(plan.target, ops=ops))
    (finding,) = report_of(naive, SHAPES["greedy"]).errors
    assert finding.rule.name == "variadic-reduce"
    assert finding.place.function.endswith("sample")


@pytest.mark.slow
@pytest.mark.parametrize("draft", [None, "ngram", "llama"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("name", TINY)
def test_every_program_of_the_backend_is_legal(
    name: str, num_devices: int, quantization: str, draft: str | None
) -> None:
    """As an engine on an Inferentia2 chip would compile them, with the shapes and the weights of the backend itself."""
    backend = NeuronBackend.described(f"inf2:{num_devices}")
    speculative_config = None if draft is None else drafting_config(draft, num_devices)
    settings = EngineConfig.from_arguments(
        model=folder_of(name, num_devices),
        tensor_parallel_size=num_devices,
        quantization=quantization,
        max_model_len=160,
        decode_steps_per_dispatch=2,
        speculative_config=speculative_config,
    )
    for source in EnginePlan.make(settings, backend).sources():
        found = lint(source.lower(backend)).errors
        assert [finding.describe() for finding in found] == [], source.describe()
