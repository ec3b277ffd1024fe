"""The whole engine against transformers: for every architecture, the same greedy tokens and the same logprobs."""

import numpy as np
import pytest
import torch

from quire.engine import LLM, SamplingParams
from tests.engine.engines import XLA_KERNELS, FewShapesBackend, check_idle
from tests.models.tiny import TINY, load_in_transformers, make_checkpoint

NUM_TOKENS = 12
# The largest difference seen in float32 is below 1e-4; the issue that this is the proof of asks for 1e-3.
TOLERANCE = 1e-3


def _expected(folder, prompt: list[int]) -> tuple[list[int], np.ndarray, float]:
    """Greedy tokens, all log-probabilities [len(prompt) + NUM_TOKENS, V], and the smallest lead of a chosen token."""
    model = load_in_transformers(folder).eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(NUM_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1).numpy()
    top = np.sort(logprobs[len(prompt) - 1 : -1], axis=-1)
    return ids[len(prompt) :], logprobs, float((top[:, -1] - top[:, -2]).min())


# One of each family here; the variants (ropes, biases, ties) run with `make slow`, and as models in tests/models.
FAMILIES = ("llama", "mistral", "qwen2-windows", "qwen3", "gemma2", "gemma3", "phi3", "mixtral", "qwen3-moe")
CASES = [
    *(
        pytest.param(name, False, None, id=name, marks=() if name in FAMILIES else pytest.mark.slow)
        for name in sorted(TINY)
    ),
    # The form that other devices run: one program for all layers, with windows and ropes that differ between them.
    *(pytest.param(name, True, None, id=f"{name}-scanned") for name in ("gemma3", "qwen3-moe")),
    # A CPU without the C++ library; tied, since an embedding that is the head as well is held otherwise then.
    pytest.param("llama3-tied-biased", False, XLA_KERNELS, id="llama3-tied-biased-xla"),
]


@pytest.mark.parametrize(("name", "scan_layers", "kernels"), CASES)
def test_greedy_tokens_and_logprobs_are_those_of_transformers(
    name: str, scan_layers: bool, kernels: str | None, tmp_path
) -> None:
    folder = make_checkpoint(name, tmp_path / name, seed=3)
    llm = LLM(
        str(folder),
        tokenizer="demo",
        backend=FewShapesBackend(scan_layers=scan_layers),
        dtype="float32",
        kernels=kernels,
        max_num_seqs=3,
        max_model_len=64,
        max_num_batched_tokens=3 + 32,
    )
    vocab_size = llm.core.model.vocab_size
    rng = np.random.default_rng(4)
    prompts = [rng.integers(3, vocab_size, n).tolist() for n in (45, 9, 50)]
    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=3, prompt_logprobs=0, detokenize=False
    )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    check_idle(llm)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, logprobs, lead = _expected(folder, prompt)
        assert lead > TOLERANCE, "a tie in the reference decides nothing; choose another seed"
        choice = output.outputs[0]
        assert choice.token_ids == tokens
        for position, (entry, token) in enumerate(zip(output.prompt_logprobs[1:], prompt[1:], strict=True)):
            assert abs(entry[token].logprob - logprobs[position, token]) < TOLERANCE
        for idx, entry in enumerate(choice.logprobs):
            for token, found in entry.items():
                assert abs(found.logprob - logprobs[len(prompt) - 1 + idx, token]) < TOLERANCE
            assert entry[tokens[idx]].rank == 1
