"""llama.cpp through llama-cpp-python's low-level interface, many sequences in one batch as llama.cpp's own server does it.

Each step holds the next token of every sequence that generates, then prompts as far as the batch has room. The best token is taken
from the logits with numpy, which costs less than llama.cpp's sampler chain.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import llama_cpp as api  # type: ignore[import-not-found]
import numpy as np

BATCH_TOKENS = 2048  # llama.cpp's default; it computes them in pieces of 512


class Engine:
    """A model; its context is made for each call, in the size that its requests need, before the clock starts."""

    def __init__(self, settings: dict[str, Any]) -> None:
        api.llama_backend_init()
        self._threads = settings["threads"]
        self._max_num_seqs = settings["max_num_seqs"]
        self._model = api.llama_model_load_from_file(settings["model"].encode(), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {settings['model']}")
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(BATCH_TOKENS, 0, 1)
        # Its server makes a context and warms it up before it says that it is ready.
        api.llama_free(self._make_context(self._max_num_seqs, settings["num_kv_tokens"] // self._max_num_seqs))
        self.about = {
            "version": f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
            "runs": f"llama_decode on batches of up to {self._max_num_seqs} sequences, BF16 GGUF, cache float16",
        }

    def generate(self, prompts: list[list[int]], output_lens: list[int], record: Any) -> None:
        """All requests, as many at once as there are slots."""
        num_slots = min(len(prompts), self._max_num_seqs)
        longest = max(len(prompt) + output_len for prompt, output_len in zip(prompts, output_lens, strict=True))
        context = self._make_context(num_slots, -(-longest // 256) * 256)
        try:
            record.start()
            self._run(
                context, [_Sequence(*request) for request in zip(prompts, output_lens, strict=True)], num_slots, record
            )
        finally:
            api.llama_free(context)

    def _make_context(self, num_slots: int, slot_tokens: int) -> Any:
        params = api.llama_context_default_params()
        params.n_ctx = num_slots * slot_tokens
        params.n_seq_max = num_slots
        params.n_batch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self._threads
        context = api.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp cannot make a context of {num_slots} sequences of {slot_tokens} tokens")
        return context

    def _run(self, context: Any, sequences: list[_Sequence], num_slots: int, record: Any) -> None:
        waiting = list(enumerate(sequences))[::-1]
        slots: dict[int, tuple[int, _Sequence]] = {}
        while waiting or slots:
            for slot in range(num_slots):
                if slot not in slots and waiting:
                    slots[slot] = waiting.pop()
            sampled = self._fill(slots)
            if status := api.llama_decode(context, self._batch):
                raise RuntimeError(f"llama_decode gave {status}")
            for slot, row in sampled.items():
                idx, sequence = slots[slot]
                token_id = self._best_token(context, row)
                record(idx, [token_id])
                if sequence.take(token_id):
                    api.llama_memory_seq_rm(api.llama_get_memory(context), slot, -1, -1)
                    del slots[slot]

    def _fill(self, slots: dict[int, tuple[int, _Sequence]]) -> dict[int, int]:
        """Fills the batch, sequences that generate first; the row of the batch that gives each slot its next token."""
        batch = self._batch
        batch.n_tokens = 0
        sampled = {}
        for slot, (_, sequence) in sorted(slots.items(), key=lambda item: item[1][1].num_left > 1):
            count = min(sequence.num_left, BATCH_TOKENS - batch.n_tokens)
            is_last = count == sequence.num_left
            for position, token_id in sequence.advance(count):
                row = batch.n_tokens
                batch.token[row], batch.pos[row], batch.logits[row] = token_id, position, False
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, slot
                batch.n_tokens += 1
            if count and is_last:
                batch.logits[batch.n_tokens - 1] = True
                sampled[slot] = batch.n_tokens - 1
        return sampled

    def _best_token(self, context: Any, row: int) -> int:
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, row), shape=(self._vocab_size,))
        return int(logits.argmax())


class _Sequence:
    """A prompt, what was made of it, and how far that is in the cache."""

    def __init__(self, prompt: list[int], output_len: int) -> None:
        self._tokens = list(prompt)
        self._end = len(prompt) + output_len
        self._num_computed = 0

    @property
    def num_left(self) -> int:
        """Tokens that are known and not computed: one while it generates."""
        return len(self._tokens) - self._num_computed

    def advance(self, count: int) -> list[tuple[int, int]]:
        """Position and id of the next `count` tokens, which count as computed."""
        begin = self._num_computed
        self._num_computed += count
        return list(enumerate(self._tokens[begin : self._num_computed], begin))

    def take(self, token_id: int) -> bool:
        """Appends a token; whether it was the last."""
        self._tokens.append(token_id)
        return len(self._tokens) == self._end


def load(settings: dict[str, Any]) -> Engine:
    """Loads the model."""
    return Engine(settings)
