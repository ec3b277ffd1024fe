"""transformers' `generate`: static batches, prompts padded on the left, each batch as long as its longest output."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

PAD = 0


class Engine:
    """A model in eager mode with scaled dot product attention."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self._model = AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._model.generation_config.eos_token_id = None  # outputs have the length that was asked for
        self._max_num_seqs = settings["max_num_seqs"]
        self.about = {
            "version": f"{transformers.__version__} (torch {torch.__version__})",
            "runs": f"generate in static batches of up to {self._max_num_seqs}, eager, sdpa, bfloat16",
        }

    def generate(self, prompts: list[list[int]], output_lens: list[int], record: Any) -> None:
        """Batch after batch in the order given."""
        record.start()
        for begin in range(0, len(prompts), self._max_num_seqs):
            idxs = range(begin, min(begin + self._max_num_seqs, len(prompts)))
            batch = _Batch(dict(enumerate(idxs)), output_lens, record)
            width = max(len(prompts[idx]) for idx in idxs)
            padding = [width - len(prompts[idx]) for idx in idxs]
            with torch.inference_mode():
                self._model.generate(
                    torch.tensor([[PAD] * pad + prompts[idx] for pad, idx in zip(padding, idxs, strict=True)]),
                    attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding]),
                    max_new_tokens=max(output_lens[idx] for idx in idxs),
                    do_sample=False,
                    pad_token_id=PAD,
                    streamer=batch,
                )


class _Batch:
    """Called by `generate` with the prompts, then with each step's tokens; notes those that were asked for."""

    def __init__(self, idxs: dict[int, int], output_lens: list[int], record: Any) -> None:
        self._idxs = idxs
        self._left = {row: output_lens[idx] for row, idx in idxs.items()}
        self._record = record
        self._has_prompts = False

    def put(self, value: Any) -> None:
        if not self._has_prompts:
            self._has_prompts = True
            return
        for row, token_id in enumerate(value.tolist()):
            if self._left[row] > 0:
                self._left[row] -= 1
                self._record(self._idxs[row], [token_id])

    def end(self) -> None:
        """The batch is done."""


def load(settings: dict[str, Any]) -> Engine:
    """Loads the model."""
    return Engine(settings)
