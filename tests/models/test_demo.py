"""The bundled pair and its head: what is in the folders, that all three really learned, and that transformers agrees about the pair."""

import ast
import math
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from quire.models.checkpoint import load_params, resolve_model
from quire.models.decoder import compute_logits, forward
from quire.models.eagle import (
    DRAFT_COLUMNS,
    EagleConfig,
    embed_for_head,
    fuse_features,
    head_forward,
    head_logits,
)
from quire.models.eagle_checkpoint import load_eagle_config, load_eagle_params
from quire.models.registry import load_config
from tests.models.helpers import dense_attend

NAMES = ("demo", "demo-draft")
RANDOM_LOSS = math.log(4096)
# Of 51 in 100 on held-out text of the corpus; this text is another one.
HEAD_AGREEMENT = 0.4

# Written for this test: no file of the standard library holds it, so neither model has seen it.
UNSEEN = '''\
import os
import json


class Inventory:
    """Keeps count of the things in a shop."""

    def __init__(self, path, limit=None):
        self.path = path
        self.limit = limit
        self.items = {}

    def load(self):
        if not os.path.exists(self.path):
            raise FileNotFoundError("no inventory at %r" % self.path)
        with open(self.path, "r", encoding="utf-8") as f:
            self.items = json.load(f)
        return self.items

    def add(self, name, count=1):
        """Add count things called name and return how many there are."""
        if count < 0:
            raise ValueError("count must not be negative")
        total = self.items.get(name, 0) + count
        if self.limit is not None and total > self.limit:
            return False
        self.items[name] = total
        return total

    def names(self):
        return sorted(key for key, value in self.items.items() if value)


def main(args=None):
    inventory = Inventory("shop.json")
    for name in args or []:
        inventory.add(name)
    print(len(inventory.names()))


if __name__ == "__main__":
    main()
'''


@cache
def _tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(resolve_model(name))


@cache
def _logits_function(name: str) -> Any:
    """token ids [T] -> logits [T, V], with plain causal attention, in float32."""
    folder = resolve_model(name)
    config = load_config(folder)
    params = load_params(folder, config, jnp.float32, stacked=False)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, kv_cache: None, layer: object) -> tuple[jax.Array, None]:
        num_tokens, num_heads, head_dim = q.shape
        q = q.reshape(num_tokens, config.num_kv_heads, num_heads // config.num_kv_heads, head_dim)
        scores = jnp.einsum("skgh,tkh->kgst", q, k) * jnp.float32(config.attention_scale)
        visible = jnp.tril(jnp.ones((num_tokens, num_tokens), bool))
        weights = jax.nn.softmax(jnp.where(visible[None, None], scores, jnp.float32(-1e9)), axis=-1)
        return jnp.einsum("kgst,tkh->skgh", weights, v).reshape(num_tokens, num_heads, head_dim), None

    @jax.jit
    def logits(token_ids: jax.Array) -> jax.Array:
        positions = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
        hidden, _, _ = forward(params, config, token_ids, positions, None, attend)
        return compute_logits(params, config, hidden)

    return logits


@cache
def _unseen_logits(name: str) -> tuple[np.ndarray, np.ndarray]:
    ids = np.asarray(_tokenizer(name)(UNSEEN)["input_ids"], np.int32)
    return ids, np.asarray(_logits_function(name)(jnp.asarray(ids)))


@cache
def _head() -> tuple[EagleConfig, Any]:
    folder = resolve_model("demo-eagle")
    config = load_eagle_config(folder, load_config(resolve_model("demo")))
    return config, load_eagle_params(folder, config, jnp.float32)


@cache
def _unseen_head_tokens() -> np.ndarray:
    """The head's best token after every token of the unseen text but the first, from the target's hidden states, [T - 1]."""
    folder = resolve_model("demo")
    target, (config, head) = load_config(folder), _head()
    target_params = load_params(folder, target, jnp.float32, stacked=False)

    @jax.jit
    def best(ids: jax.Array) -> jax.Array:
        positions = jnp.arange(ids.shape[0], dtype=jnp.int32)
        captured = forward(
            target_params, target, ids, positions, None, dense_attend(target), captured_layers=config.captured_layers
        ).captured
        assert captured is not None
        features, embeddings = fuse_features(head, captured[:-1]), embed_for_head(head, config, target_params, ids[1:])
        attend = dense_attend(config.model)
        hidden, _ = head_forward(head, config, embeddings, features, positions[:-1], None, attend)
        return head_logits(head, config, hidden).argmax(axis=-1)

    return np.asarray(best(jnp.asarray(_unseen_logits("demo")[0])))


def _loss(ids: np.ndarray, logits: np.ndarray) -> float:
    """Nats per token of ids[1:]."""
    log_p = torch.log_softmax(torch.tensor(logits[:-1]), dim=-1).numpy()
    return float(-log_p[np.arange(len(ids) - 1), ids[1:]].mean())


def _complete(name: str, prompt: str, num_tokens: int, *, temperature: float = 0.0, seed: int = 0) -> list[int]:
    """A continuation, ended by an end token, over a context of fixed length so that one program serves every step."""
    rng, ids = np.random.default_rng(seed), list(_tokenizer(name)(prompt)["input_ids"])
    start, ends = len(ids), load_config(resolve_model(name)).eos_token_ids
    while len(ids) < start + num_tokens and ids[-1] not in ends:
        padded = np.zeros(96, np.int32)
        padded[: len(ids)] = ids
        logits = np.asarray(_logits_function(name)(jnp.asarray(padded)))[len(ids) - 1]
        ids.append(int((logits + temperature * rng.gumbel(size=logits.shape)).argmax()))
    return ids[start:]


def _is_signature(line: str) -> bool:
    """Whether a line is the head of a function definition, complete from "def" to the colon."""
    try:
        ast.parse(line + "\n    pass\n")
    except SyntaxError:
        return False
    return line.startswith("def ") and "(" in line and "):" in line


def _num_parameters(name: str) -> int:
    with safe_open(resolve_model(name) / "model.safetensors", "np") as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118, not a dict


def test_the_target_has_five_to_eight_million_parameters_and_the_draft_at_most_a_quarter_of_that() -> None:
    target, draft = map(_num_parameters, NAMES)
    assert 5_000_000 <= target <= 8_000_000
    assert draft <= target / 4


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_bfloat16_and_small_enough_to_bundle(name: str) -> None:
    path = resolve_model(name) / "model.safetensors"
    assert path.stat().st_size <= 16_000_000
    with safe_open(path, "np") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118, not a dict


def test_target_and_draft_share_one_tokenizer() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        target, draft = ((resolve_model(name) / file).read_bytes() for name in NAMES)
        assert target == draft


@given(st.text())
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    tokenizer = _tokenizer("demo")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    "text", ["def f(x):\n\treturn  x \r\n\n\n", "naïve — 漢字 🐍\u200d🔥", "x=12345.678e-9", " \n \t\n"]
)
def test_awkward_text_comes_back_from_its_tokens(text: str) -> None:
    tokenizer = _tokenizer("demo")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_indentation_is_one_token_and_digits_stand_alone() -> None:
    tokenizer = _tokenizer("demo")
    assert len(tokenizer("\n" + " " * 8)["input_ids"]) == 1
    assert len(tokenizer("1234")["input_ids"]) == 4


def test_a_chat_renders_with_the_special_tokens_and_invites_an_answer() -> None:
    tokenizer = _tokenizer("demo")
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "A"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n<|user|>\nA<|end|>\n<|assistant|>\n"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|end|>")) == 3


def test_a_chat_with_an_unknown_role_is_refused() -> None:
    with pytest.raises(Exception, match="roles are system, user and assistant, not tool"):
        _tokenizer("demo").apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("name", NAMES)
def test_generation_ends_at_the_end_of_text_or_of_a_turn(name: str) -> None:
    tokenizer = _tokenizer(name)
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|end|>")}
    assert set(load_config(resolve_model(name)).eos_token_ids) == ends


@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_the_same_logits(name: str) -> None:
    ids, ours = _unseen_logits(name)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize(("name", "bound"), [("demo", 3.4), ("demo-draft", 3.7)])
def test_unseen_code_is_predicted_far_better_than_by_chance(name: str, bound: float) -> None:
    ids, logits = _unseen_logits(name)
    assert _loss(ids, logits) < bound < RANDOM_LOSS / 2


def test_the_target_predicts_better_than_the_draft() -> None:
    target, draft = (_loss(*_unseen_logits(name)) for name in NAMES)
    assert target < draft


def test_the_draft_often_proposes_what_the_target_would_choose() -> None:
    target, draft = (_unseen_logits(name)[1].argmax(axis=-1) for name in NAMES)
    assert (target == draft).mean() > 0.5


def test_the_head_often_proposes_what_the_target_would_choose() -> None:
    target = _unseen_logits("demo")[1].argmax(axis=-1)
    assert (target[1:] == _unseen_head_tokens()).mean() > HEAD_AGREEMENT


def test_the_head_is_small_and_in_bfloat16_with_its_tokens_numbered() -> None:
    path = resolve_model("demo-eagle") / "model.safetensors"
    assert path.stat().st_size <= 3_000_000
    with safe_open(path, "np") as file:
        dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118, not a dict
    assert (dtypes.pop("d2t"), dtypes.pop("t2d")) == ("I64", "BOOL")
    assert set(dtypes.values()) == {"BF16"}


def test_the_head_can_propose_the_ends_of_texts_and_turns() -> None:
    columns = np.asarray(_head()[1][DRAFT_COLUMNS])
    assert (columns[list(load_config(resolve_model("demo")).eos_token_ids)] >= 0).all()


def test_most_definitions_are_completed_as_python() -> None:
    tokenizer = _tokenizer("demo")
    texts = ["def " + tokenizer.decode(_complete("demo", "def ", 24, temperature=0.7, seed=seed)) for seed in range(8)]
    heads = [text.split("\n")[0] for text in texts]
    assert sum(map(_is_signature, heads)) > len(heads) / 2, heads


def test_the_body_of_a_function_is_indented() -> None:
    body = _tokenizer("demo").decode(_complete("demo", "def area(self, width):\n", 12))
    assert body.startswith("    ")


def test_a_chat_answer_ends_its_turn() -> None:
    tokenizer = _tokenizer("demo")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does os.path.join do?"}], tokenize=False, add_generation_prompt=True
    )
    answer = _complete("demo", prompt, 70)
    assert len(answer) > 3
    assert answer[-1] == tokenizer.convert_tokens_to_ids("<|end|>")


def test_the_model_card_states_the_sizes_of_the_files() -> None:
    card = (Path(resolve_model("demo")).parent / "README.md").read_text()
    for name in NAMES:
        assert f"{_num_parameters(name):,}" in card
