"""What speculation refuses: every key with a wrong value, models that do not go together, and what the sampler was not compiled for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from quire.backends.neuron import NeuronBackend
from quire.engine import LLM
from quire.engine.config import EngineConfig
from quire.engine.planning import EnginePlan
from quire.engine.speculation import METHODS, SpeculativeConfig
from quire.engine.tokenizer import TOKENIZER_FILES
from quire.kernels.errors import InvalidConfigError, InvalidRequestError, ModelError
from quire.models.checkpoint import resolve_model
from tests.engine.draft_engines import QuickBackend, assert_same, checkpoint, draft_config, engine, greedy, model_config
from tests.engine.engines import generate, tiny_folder

NGRAM = {"method": "ngram"}
MODEL = {"method": "draft_model", "model": "demo-draft"}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("{", "speculative_config is a JSON object, and this is none"),
        ("[1]", r"speculative_config holds settings by name, not \[1\]"),
        (7, "speculative_config holds settings by name, not 7"),
        ({}, "method=None is not one of draft_model, ngram"),
        ({"method": "medusa"}, "method='medusa' is not one of draft_model, ngram"),
        ({"method": ["ngram"]}, r"method=\['ngram'\] is not one of"),
        ({**NGRAM, "num_tokens": 3}, "has no num_tokens; there are: method, model, num_speculative_tokens"),
        ({**NGRAM, "num_speculative_tokens": 0}, "num_speculative_tokens must be a whole number from 1 to 16, not 0"),
        ({**NGRAM, "num_speculative_tokens": 17}, "num_speculative_tokens must be a whole number from 1 to 16, not 17"),
        ({**NGRAM, "num_speculative_tokens": 2.0}, r"num_speculative_tokens must be a whole number .*, not 2\.0"),
        ({**NGRAM, "num_speculative_tokens": True}, "num_speculative_tokens must be a whole number .*, not True"),
        ({**NGRAM, "num_speculative_tokens": None}, "num_speculative_tokens must be a whole number .*, not None"),
        ({**NGRAM, "prompt_lookup_max": 9}, "prompt_lookup_max must be a whole number from 1 to 8, not 9"),
        ({**NGRAM, "prompt_lookup_max": "4"}, "prompt_lookup_max must be a whole number from 1 to 8, not '4'"),
        ({**NGRAM, "prompt_lookup_min": 0}, "prompt_lookup_min must be a whole number from 1 to 4, not 0"),
        (
            {**NGRAM, "prompt_lookup_min": 4, "prompt_lookup_max": 3},
            "prompt_lookup_min must be a whole number from 1 to 3, not 4",
        ),
        ({**NGRAM, "adaptive": 1}, "adaptive must be true or false, not 1"),
        ({**NGRAM, "quantization": "int4"}, "quantization must be none or int8, not 'int4'"),
        ({**NGRAM, "model": "demo-draft"}, "method='ngram' drafts without a model; leave out model='demo-draft'"),
        ({"method": "draft_model"}, "method='draft_model' needs a model to draft with"),
        ({**MODEL, "model": 3}, "method='draft_model' needs a model to draft with"),
        ({"model": 3}, "method='draft_model' needs a model to draft with"),
    ],
    ids=repr,
)
def test_a_wrong_value_is_refused_with_what_is_allowed(given: Any, reason: str) -> None:
    """When the engine is asked for, before anything is read or compiled."""
    with pytest.raises(InvalidConfigError, match=reason):
        SpeculativeConfig.parse(given)
    with pytest.raises(InvalidConfigError, match=reason):
        EngineConfig.from_arguments(model="no-such-model", speculative_config=given)


def test_what_is_left_out_is_as_documented() -> None:
    assert set(METHODS) == {"draft_model", "ngram", "eagle3"}
    found = SpeculativeConfig.parse('{"model": "demo-draft"}')
    assert found == SpeculativeConfig.parse(MODEL) == SpeculativeConfig.parse(found)
    assert (found.method, found.num_speculative_tokens, found.adaptive, found.quantization) == (
        "draft_model",
        5,
        True,
        None,
    )
    assert (found.prompt_lookup_min, found.prompt_lookup_max) == (2, 4)


@pytest.mark.parametrize(("most", "counts"), [(1, (8,)), (2, (4, 8)), (3, (2, 4, 8)), (9, (1, 2, 4, 8))])
def test_the_numbers_of_drafts_that_are_compiled_are_halves(most: int, counts: tuple[int, ...]) -> None:
    assert SpeculativeConfig.parse({**NGRAM, "num_speculative_tokens": 8}).draft_counts(most) == counts
    fixed = SpeculativeConfig.parse({**NGRAM, "num_speculative_tokens": 8, "adaptive": False})
    assert fixed.draft_counts(most) == (8,)


def plan(model: Path, config: str, **settings: Any) -> EnginePlan:
    settings = {"dtype": "float32", "max_model_len": 160, "num_kv_blocks": 20, **settings}
    arguments = EngineConfig.from_arguments(model=str(model), speculative_config=config, **settings)
    return EnginePlan.make(arguments, NeuronBackend.described("inf2"))


def test_a_draft_model_that_is_nowhere_is_refused() -> None:
    with pytest.raises(ModelError, match="/no/such/draft"):
        plan(tiny_folder(), model_config(Path("/no/such/draft"), 3))


def test_a_vocabulary_of_another_size_is_refused_with_both_sizes() -> None:
    with pytest.raises(
        InvalidConfigError, match="the draft model's vocabulary has 99 tokens and the target's 101; take a draft model"
    ):
        plan(tiny_folder(), model_config(tiny_folder(vocab_size=99), 3))


def with_tokenizer(target: Path, source: Path, swapped: tuple[str, str] | None = None) -> Path:
    """A model's folder with a tokenizer, in which the ids of two tokens may be exchanged."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    if swapped is not None:
        path = target / "tokenizer.json"
        content = json.loads(path.read_text())
        vocabulary, (one, other) = content["model"]["vocab"], swapped
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        path.write_text(json.dumps(content))
    return target


def two_tokens() -> tuple[str, str, int]:
    """Two single letters of the bundled tokenizer, and the smaller of their ids."""
    vocabulary = json.loads((resolve_model("demo") / "tokenizer.json").read_text())["model"]["vocab"]
    return "b", "c", min(vocabulary["b"], vocabulary["c"])


def copy_of(folder: Path, path: Path) -> Path:
    path.mkdir()
    shutil.copy(folder / "config.json", path / "config.json")
    return path


def test_a_vocabulary_with_other_meanings_is_refused_with_the_first_that_differs(tmp_path: Path) -> None:
    one, other, token_id = two_tokens()
    demo = resolve_model("demo")
    target = with_tokenizer(copy_of(tiny_folder(vocab_size=101), tmp_path / "target"), demo)
    same = with_tokenizer(copy_of(tiny_folder(vocab_size=101), tmp_path / "same"), demo)
    draft = with_tokenizer(copy_of(tiny_folder(vocab_size=101), tmp_path / "draft"), demo, (one, other))
    assert plan(target, model_config(same, 3)).draft is not None
    with pytest.raises(
        InvalidConfigError, match=rf"token {token_id} is '[bc]' there and '[bc]' here.*draft has another"
    ):
        plan(target, model_config(draft, 3))


def test_a_tokenizer_that_takes_the_place_of_the_targets_own_is_what_is_compared(tmp_path: Path) -> None:
    """Also where it is named and not a folder."""
    one, other, token_id = two_tokens()
    demo = resolve_model("demo")
    draft = with_tokenizer(copy_of(tiny_folder(), tmp_path / "draft"), demo, (one, other))
    for tokenizer in (str(demo), "demo"):
        with pytest.raises(InvalidConfigError, match=f"token {token_id} is "):
            plan(tiny_folder(), model_config(draft, 3), tokenizer=tokenizer)


def test_a_draft_model_made_for_fewer_positions_is_noted_with_both_numbers() -> None:
    """It drafts beyond them too: positions are rotations, of which there is no last."""
    short = plan(tiny_folder(), model_config(tiny_folder(max_position_embeddings=96), 3)).resolved
    assert [note for note in short.notes if "96 positions and max_model_len is 160" in note]
    assert not plan(tiny_folder(), model_config(tiny_folder(max_position_embeddings=160), 3)).resolved.notes


def test_a_draft_model_that_cannot_be_spread_is_refused_by_name() -> None:
    target = tiny_folder(num_attention_heads=6, num_key_value_heads=2)
    draft = tiny_folder()  # 9 heads
    assert plan(target, NGRAM_JSON, tensor_parallel_size=2).draft is None
    with pytest.raises(InvalidConfigError, match=rf"draft model.*{draft}.*num_attention_heads=9 is not a multiple"):
        plan(target, model_config(draft, 3), tensor_parallel_size=2)


NGRAM_JSON = json.dumps(NGRAM)


@pytest.mark.parametrize(
    ("draft", "sampling"),
    [
        ("good", "random"),
        ("ngram", "greedy"),
        pytest.param("good", "greedy", marks=pytest.mark.slow),
        pytest.param("ngram", "random", marks=pytest.mark.slow),
    ],
)
def test_a_lower_level_of_sampling_speculates_and_refuses_what_it_refused(draft: str, sampling: str) -> None:
    """The drafts' sampler is that of the step."""
    llm = LLM(
        str(checkpoint()),
        tokenizer="demo",
        backend=QuickBackend(),
        speculative_config=draft_config(draft, 3),
        sampling=sampling,
        max_num_seqs=2,
        max_model_len=160,
        dtype="float32",
    )
    params = [greedy(30)] if sampling == "greedy" else [greedy(30), greedy(30, temperature=0.9, seed=1)]
    prompts = [[5, 6, 7, 8] * 9] * len(params)
    assert_same(generate(llm, prompts, params), generate(engine(enable_prefix_caching=False), prompts, params))
    assert llm.stats().num_draft_rounds > 0
    refused = greedy(5, temperature=1.0) if sampling == "greedy" else greedy(5, logprobs=1)
    with pytest.raises(InvalidRequestError, match=rf"sampling={sampling}"):
        llm.generate(prompts[:1], refused, use_tqdm=False)
