"""The engine on the NKI kernels, emulated inside the step."""

import pytest

from quire.engine import SamplingParams
from tests.engine.engines import XLA_KERNELS, generate, tiny_engine, token_ids

EMULATED = "linear=reference,write_kv=nki_emulated,paged_attention=nki_emulated,sample=reference"
PROMPTS = [[5, 6, 7, 8] * 11, [3, 1, 4, 1, 5], [9] * 20]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_tokens_are_those_of_the_reference(scan_layers: bool) -> None:
    """Prompts over several tiles and steps, cached prefixes, and rows of all lengths."""
    params = [
        SamplingParams(temperature=t, seed=idx, max_tokens=6, ignore_eos=True, detokenize=False)
        for idx, t in enumerate((0.0, 1.0, 0.7))
    ]
    settings = {"scan_layers": scan_layers, "max_num_batched_tokens": 4 + 32}
    expected = generate(tiny_engine(kernels=XLA_KERNELS, **settings), PROMPTS, params)
    llm = tiny_engine(kernels=EMULATED, **settings)
    for _ in range(2):  # the second time prefixes are cached
        assert token_ids(generate(llm, PROMPTS, params)) == token_ids(expected)
    assert llm.stats().num_prefix_hits > 0
