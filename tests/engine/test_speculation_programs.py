"""What speculative steps are as programs: no cache is copied, nothing is compiled late, other kernels give the same tokens."""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from quire.backends.cpu import CpuBackend
from quire.engine import LLM, SamplingParams
from quire.engine.compile_report import examine
from quire.engine.config import EngineConfig
from quire.engine.planning import EnginePlan
from tests.engine.draft_engines import assert_same, checkpoint, draft_config, engine, model_config, without_drafts
from tests.engine.engines import XLA_KERNELS, FewShapesBackend, check_idle, generate, tiny_folder

# Large enough that a copy of a cache would stand out from everything else in the program. The draft model is another than the target, and
# so is the shape of its cache.
NUM_BLOCKS = 9000
DRAFT = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 1}


def caches_of(llm: LLM) -> dict[str, list[jax.Array]]:
    state = llm.core.runner.state
    return {"target": jax.tree.leaves(state.kv_cache), "draft": jax.tree.leaves(state.draft_cache)}


def assert_no_cache_is_copied(llm: LLM) -> None:
    caches = caches_of(llm)
    assert len({cache.shape for leaves in caches.values() for cache in leaves}) == len(
        [c for c in caches.values() if c]
    )
    smallest = min(sum(cache.nbytes for cache in leaves) for leaves in caches.values() if leaves)
    for shape, program in llm.core.runner.programs.items():
        memory = program.memory_analysis()
        text = program.as_text()
        # Programs that do not write a cache are not given it.
        source = llm.core.runner.step_source(shape)
        given = {"target": not shape.is_catch_up, "draft": bool(shape.num_drafts or shape.is_catch_up)}
        total = sum(cache.nbytes for name, leaves in caches.items() for cache in leaves if given[name])
        assert total <= sum(leaf.size * leaf.dtype.itemsize for leaf in source.arguments[2]) < total + smallest / 2
        assert memory.alias_size_in_bytes >= total, f"{shape.describe()}: a cache is not updated in place"
        for name, leaves in caches.items():
            for cache in leaves[:1]:
                kind = {"float32": "f32", "uint16": "u16", "bfloat16": "bf16"}[cache.dtype.name]
                sizes = ",".join(map(str, cache.shape))
                copy = re.compile(rf"= {re.escape(f'{kind}[{sizes}]')}\S* copy\(")
                copies = [line for line in text.splitlines() if copy.search(line)]
                assert not copies, f"{shape.describe()} copies the {name}'s: {copies[:2]}"
        assert memory.temp_size_in_bytes < smallest / 2, (
            f"{shape.describe()}: {memory.temp_size_in_bytes} of {smallest}"
        )


def speculating(config: str, **settings: Any) -> LLM:
    """The CPU's own shapes, in full."""
    defaults = {"max_num_seqs": 4, "max_model_len": 256, "num_kv_blocks": NUM_BLOCKS, "dtype": "float32", "seed": 5}
    return LLM(str(tiny_folder()), load_format="dummy", speculative_config=config, **{**defaults, **settings})


def draft_model(num_drafts: int, **settings: Any) -> str:
    return model_config(tiny_folder(**DRAFT), num_drafts, **settings)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return speculating(draft_model(3, adaptive=True))


def test_no_program_copies_either_cache() -> None:
    few = speculating(draft_model(2), backend=FewShapesBackend())
    assert all(caches_of(few).values())
    assert_no_cache_is_copied(few)


@pytest.mark.slow
def test_no_program_of_the_whole_list_copies_either_cache(llm: LLM) -> None:
    assert all(caches_of(llm).values())
    assert {shape.num_drafts for shape in llm.core.runner.programs} == {0, 1, 3}
    assert any(shape.is_catch_up for shape in llm.core.runner.programs)
    assert_no_cache_is_copied(llm)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16"},
        {"decode_steps_per_dispatch": 2},
        {"dtype": "bfloat16", "quantization": "int8"},
        {"kernels": XLA_KERNELS, "sampling": "random"},
    ],
)
@pytest.mark.parametrize(
    "config", [draft_model(3), '{"method": "ngram", "num_speculative_tokens": 4}'], ids=["model", "ngram"]
)
def test_no_program_copies_a_cache_in_other_forms(config: str, settings: dict[str, Any]) -> None:
    assert_no_cache_is_copied(speculating(config, **settings))


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """A program of one line."""

    text: str

    def as_text(self) -> str:
        return self.text

    def memory_analysis(self) -> Any:
        names = ("argument", "output", "alias", "temp", "generated_code")
        return SimpleNamespace(**{f"{name}_size_in_bytes": 0 for name in names})


def test_what_compiling_tells_of_copies_counts_those_of_a_draft_models_cache() -> None:
    settings = EngineConfig.from_arguments(
        model=str(tiny_folder()),
        speculative_config=draft_model(2),
        dtype="float32",
        max_model_len=160,
        num_kv_blocks=20,
    )
    plan = EnginePlan.make(settings, CpuBackend())
    compiler = SimpleNamespace(capabilities=plan.backend.capabilities, compile=lambda lowered: lowered)
    plan = dataclasses.replace(plan, target=dataclasses.replace(plan.target, backend=compiler))
    for part in plan.models:
        sizes = ",".join(map(str, part.cache_arrays(20).shape))
        for line, copies in (("copy", 1), ("add", 0)):
            program = _Compiled(f"  %x = f32[{sizes}]{{3,2,1,0}} {line}(f32[{sizes}]{{3,2,1,0}} %y)")
            source = SimpleNamespace(describe=lambda: "a step", lower=lambda backend, program=program: program)
            assert examine(source, plan, None).cache_copies == copies


def test_without_drafts_lookup_runs_the_programs_of_an_engine_without_speculation() -> None:
    """So a batch that does not draft pays nothing on the device, neither to compute nor to read."""
    settings: dict[str, Any] = {"num_kv_blocks": 20, "sampling": "random", "backend": FewShapesBackend()}
    with_lookup = speculating('{"method": "ngram", "num_speculative_tokens": 2, "adaptive": true}', **settings)
    without = LLM(
        str(tiny_folder()), load_format="dummy", dtype="float32", seed=5, max_num_seqs=4, max_model_len=256, **settings
    )
    plain = {shape for shape in with_lookup.core.runner.programs if not shape.num_drafts}
    assert plain
    assert plain == set(without.core.runner.programs)
    for shape in plain:
        texts = [_operations(llm.core.runner.programs[shape].as_text()) for llm in (with_lookup, without)]
        assert texts[0] == texts[1], shape.describe()


def _operations(text: str) -> list[str]:
    """What a compiled program computes, without the places in the source that its operations came from."""
    begin = re.search(r"^(ENTRY )?%", text, re.MULTILINE)
    assert begin, "a program without computations"
    computations = text[begin.start() :]
    return [re.sub(r", (metadata=\{[^}]*\}|stack_frame_id=\d+)", "", line) for line in computations.splitlines()]


@pytest.mark.slow
def test_nothing_is_compiled_after_warm_up_whatever_is_asked(llm: LLM) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 101, n).tolist() for n in (1, 40, 200, 7, 90, 3)]
    num_compilations = llm.stats().num_compilations
    # The slot update is one more, where no engine of this process had an equal one.
    assert num_compilations >= len(llm.core.runner.programs)
    common = {"max_tokens": 9, "detokenize": False}
    for params in (
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.5, "logprobs": 3},
        {"temperature": 0.0, "prompt_logprobs": 2},
        {"temperature": 0.5, "allowed_token_ids": [4, 5, 6], "n": 3},
    ):
        for num_drafts in (None, 0, 1, 2):
            for count in (1, 3, 6):
                asked = SamplingParams(**common, **params, num_speculative_tokens=num_drafts)
                llm.generate(prompts[:count], asked, use_tqdm=False)
                check_idle(llm)
    assert llm.stats().num_compilations == num_compilations
    assert llm.stats().num_draft_rounds > 0


PROMPTS = [[5, 6, 7, 8] * 11, [3, 1, 4, 1, 5], [9] * 20, [2, 7, 1, 8, 2, 8]]
PARAMS = [
    SamplingParams(temperature=t, seed=idx, max_tokens=72, ignore_eos=True, detokenize=False)
    for idx, t in enumerate((0.0, 1.0, 0.0, 0.7))
]


@pytest.mark.slow
@pytest.mark.parametrize("num_kv_blocks", [100, 11])
def test_tokens_by_the_kernels_of_tpus_are_those_of_the_reference(num_kv_blocks: int) -> None:
    """Chunked prompts, cached prefixes, drafts that are accepted and not, and preemption where blocks are short."""
    expected = generate(engine(enable_prefix_caching=False), PROMPTS, without_drafts(PARAMS))
    llm = engine(
        "good",
        3,
        interpreted=True,
        scan_layers=True,
        kernels=XLA_KERNELS,
        block_size=16,
        max_num_batched_tokens=4 + 32,
        num_kv_blocks=num_kv_blocks,
    )
    for _ in range(2):  # the second time prefixes are cached
        assert_same(generate(llm, PROMPTS, PARAMS), expected)
    stats = llm.stats()
    assert (stats.num_preemptions > 0) == (num_kv_blocks < 100)
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens


@pytest.mark.slow
def test_shapes_that_fit_closely_give_the_tokens_of_one_that_covers_all() -> None:
    """Drafts of several numbers, in programs of several widths: the CPU's own list."""
    llm = LLM(
        str(checkpoint()),
        tokenizer="demo",
        backend=CpuBackend(),
        speculative_config=draft_config("good", 4, adaptive=True),
        sampling="random",
        max_num_seqs=4,
        max_model_len=160,
        dtype="float32",
    )
    expected = generate(engine(enable_prefix_caching=False), PROMPTS, without_drafts(PARAMS))
    for count in (1, 2, 4, 4, 4):
        assert_same(generate(llm, PROMPTS[:count], PARAMS[:count]), expected[:count])
    assert llm.stats().num_draft_rounds > 0
