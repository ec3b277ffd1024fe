"""The engine on the TPU's kernels, interpreted: what the compiler alone cannot say."""

import functools

import pytest

from quire.engine import LLM, SamplingParams
from tests.engine.engines import XLA_KERNELS, InterpretedBackend, generate, tiny_engine, tiny_folder, token_ids

PROMPTS = [[5, 6, 7, 8] * 11, [3, 1, 4, 1, 5], [9] * 20, [2, 7, 1, 8, 2, 8]]


@functools.cache
def interpreted_engine(**settings) -> LLM:
    defaults = {"max_num_seqs": 4, "max_model_len": 160, "dtype": "float32", "seed": 5, "block_size": 16}
    backend = InterpretedBackend(scan_layers=True)
    return LLM(
        str(tiny_folder()), backend=backend, load_format="dummy", kernels=XLA_KERNELS, **{**defaults, **settings}
    )


@pytest.mark.parametrize("num_kv_blocks", [pytest.param(100, marks=pytest.mark.slow), 11])
def test_tokens_are_those_of_the_reference(num_kv_blocks: int) -> None:
    """Chunked prompts, cached prefixes, rows of all lengths, and preemption where blocks are short."""
    temperatures = (0.0, 1.0, 0.0, 0.7)
    params = [
        SamplingParams(temperature=t, seed=idx, max_tokens=20, ignore_eos=True, detokenize=False)
        for idx, t in enumerate(temperatures)
    ]
    expected = generate(tiny_engine(kernels=XLA_KERNELS, scan_layers=True), PROMPTS, params)
    llm = interpreted_engine(max_num_batched_tokens=4 + 32, num_kv_blocks=num_kv_blocks)
    for _ in range(2):  # the second time prefixes are cached
        assert token_ids(generate(llm, PROMPTS, params)) == token_ids(expected)
    assert (llm.stats().num_preemptions > 0) == (num_kv_blocks < 100)
    assert llm.stats().num_prefix_hits > 0
