"""Engines on several devices, in a process of its own in which the CPU counts as eight: `python spread_engines.py CASE ...` prints JSON.

The parent process is `test_tensor_parallel`; this side knows the models, and runs each alone and spread.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from quire.backends.base import ShapeLimits, StepShape
from quire.engine import LLM, SamplingParams
from quire.kernels.sampling.rows import SamplingMode
from quire.models.checkpoint import SINGLE_FILE, save_params
from quire.models.params import init_params
from quire.models.registry import load_config
from tests.engine.draft_engines import QuickCompiler
from tests.engine.engines import XLA_KERNELS, FewShapesBackend, InterpretedBackend, check_idle, tiny_folder

EVEN = {"hidden_size": 40, "num_attention_heads": 8, "intermediate_size": 56, "head_dim": 8}
# Beside the tiny Llama, whose vocabulary of 101 cannot be cut evenly: what a device's part of a model can get wrong.
MODELS: dict[str, dict[str, Any]] = {
    "dense": {**EVEN, "num_key_value_heads": 4},
    "one_kv_head": {**EVEN, "num_key_value_heads": 1},
    "two_kv_heads": {**EVEN, "num_key_value_heads": 2},
    "biases_tied": {
        **EVEN,
        "architectures": ("Qwen2ForCausalLM",),
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qk_norm_experts": {
        **EVEN,
        "architectures": ("Qwen3MoeForCausalLM",),
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": (),
    },
}
MODELS["experts_in_parts"] = {**MODELS["qk_norm_experts"], "num_experts": 3}
MODELS["from_files"] = MODELS["one_kv_head"]


def _model_folder(model: str) -> Path:
    folder = tiny_folder(**MODELS[model])
    if model == "from_files" and not (folder / SINGLE_FILE).exists():
        config = load_config(folder)
        save_params(init_params(config, 5, np.float32, stacked=False), config, folder, dtype=np.float32)
    return folder


PROMPTS = [[5, 6, 7, 8] * 9, [3, 1, 4, 1, 5], [9] * 20, [2, 7, 1, 8, 2, 8]]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, detokenize=False, logprobs=3),
    SamplingParams(temperature=1.0, seed=7, max_tokens=16, ignore_eos=True, detokenize=False),
    SamplingParams(
        temperature=0.8,
        top_k=20,
        top_p=0.9,
        seed=3,
        max_tokens=12,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=2,
    ),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=12, ignore_eos=True, detokenize=False),
]


class PlainShapesBackend(FewShapesBackend):
    """Beside the shapes that cover everything, those in which each device samples among its own tokens."""

    def step_shapes(self, limits: ShapeLimits) -> list[StepShape]:
        full = list(super().step_shapes(limits))
        modes = (SamplingMode.GREEDY, SamplingMode.RANDOM)
        sampling = [shape for shape in full if not shape.is_catch_up]
        return [*full, *(replace(s, sampling=mode, prompt_logprobs=False) for s in sampling for mode in modes)]


class InterpretedShapesBackend(InterpretedBackend, PlainShapesBackend):
    """The same with the TPU's kernels."""


def _speculative_config(model: str, draft: str | None) -> str | None:
    """`draft` is ngram, or model: the target's first layer, with weights that are random for both alike."""
    if draft is None:
        return None
    common = {"num_speculative_tokens": 3, "adaptive": False}
    if draft == "ngram":
        return json.dumps({"method": "ngram", "prompt_lookup_min": 1, **common})
    return json.dumps({"model": str(tiny_folder(**MODELS[model], num_hidden_layers=1)), **common})


class QuickShapesBackend(QuickCompiler, PlainShapesBackend):
    """The first of them, made quickly."""


def run(
    model: str, num_devices: int, *, scan_layers: bool, interpreted: bool = False, draft: str | None = None
) -> tuple[list[list[int]], list[float]]:
    """Tokens of every request, and the first one's logprobs; requests that ask for little run by themselves once more."""
    kind = QuickShapesBackend if draft else PlainShapesBackend
    backend = (InterpretedShapesBackend if interpreted else kind)(scan_layers=scan_layers)
    llm = LLM(
        str(_model_folder(model)),
        backend=backend,
        tokenizer="demo",
        load_format="auto" if model == "from_files" else "dummy",
        dtype="float32",
        seed=5,
        max_num_seqs=4,
        max_model_len=64,
        tensor_parallel_size=num_devices,
        kernels=XLA_KERNELS if num_devices == 1 else None,
        speculative_config=_speculative_config(model, draft),
    )
    outputs = llm.generate([list(p) for p in PROMPTS], [replace(p) for p in PARAMS], use_tqdm=False)
    plain = [
        SamplingParams(temperature=t, seed=11, max_tokens=24, ignore_eos=True, detokenize=False) for t in (0.0, 0.9)
    ]
    for params in plain:
        outputs += llm.generate([list(p) for p in PROMPTS], params, use_tqdm=False)
    check_idle(llm)
    stats = llm.stats()
    assert draft is None or 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    first = outputs[0].outputs[0]
    assert first.logprobs is not None
    logprobs = [entry[token].logprob for entry, token in zip(first.logprobs, first.token_ids, strict=True)]
    return [output.outputs[0].token_ids for output in outputs], logprobs


def main() -> None:
    """Each case is MODEL:DEVICES:LAYERS or MODEL:DEVICES:LAYERS:DRAFT.

    Layers are scanned, unrolled, or scanned with the TPU's kernels: pallas. Drafts come from a model, or from ngram.
    """
    assert len(jax.devices()) == 8, "XLA_FLAGS gives the CPU eight devices"
    found = {}
    for case in sys.argv[1:]:
        model, num_devices, layers, *drafts = case.split(":")
        found[case] = run(
            model,
            int(num_devices),
            scan_layers=layers != "unrolled",
            interpreted=layers == "pallas",
            draft=drafts[0] if drafts else None,
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
