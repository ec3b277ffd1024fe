"""The training loop of an EAGLE-3 head: saved regularly, resumed if interrupted, reported on held-out text."""

import logging
import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quire.models.eagle import DRAFT_COLUMNS, EagleConfig, init_eagle_params
from quire.models.params import Params
from quire.models.training.batches import Ids, Sampler
from quire.models.training.export import export_head
from quire.models.training.head_step import (
    NUM_UNROLLED,
    Agreement,
    Teacher,
    fresh_head,
    make_agreement,
    make_head_optimizer,
    make_head_step,
)
from quire.models.training.schedule import learning_rate_factor, row_length
from quire.models.training.step import TrainState

logger = logging.getLogger("quire.train_eagle")

TOKENS_PER_STEP = 2048
_ROWS_PER_CALL = 8


@dataclass(frozen=True)
class HeadRun:
    """What stays the same for the whole run. `held_out` has rows [B, L] per kind of text."""

    out: Path
    state_file: Path
    head: EagleConfig
    raw_config: Mapping[str, Any]
    teacher: Teacher
    held_out: Mapping[str, Ids]


def train_head(run: HeadRun, sampler: Sampler, *, steps: int, save_every: int, seed: int) -> Params:
    """Trains up to step `steps`, saving and reporting every `save_every` ones; exports in bfloat16, and returns it in float32.

    Rows, learning rate and so the result depend on `steps` and the seed alone, whether or not the run was interrupted.
    """
    fresh = _fresh(run, seed)
    optimizer = make_head_optimizer(fresh)
    state: TrainState = (fresh, optimizer.init(fresh))
    done = 0
    if run.state_file.exists():
        state, done = _resume(run, sampler)
    logger.info("parameters: %s", f"{sum(leaf.size for leaf in jax.tree.leaves(state[0])):,}")
    step, agreement = make_head_step(run.head, run.teacher, optimizer), make_agreement(run.head, run.teacher)
    averages, began, first = None, time.monotonic(), done
    while done < steps:
        length = row_length(done / steps)
        rows = sampler.batch(done, TOKENS_PER_STEP // length, length)[:, :-1]
        factor = jnp.float32(learning_rate_factor((done + 1) / (steps + 1)))
        state, losses = step(state, run.teacher.params, jnp.asarray(rows), factor)
        averages = np.asarray(losses) if averages is None else 0.95 * averages + 0.05 * np.asarray(losses)
        done += 1
        if done % 10 == 0 or done == 1:
            rate = (done - first) * TOKENS_PER_STEP / (time.monotonic() - began)
            parts = ", ".join(f"{loss:.3f}" for loss in averages)
            logger.info("step %d of %d, %.0f tokens/s, train loss by draft: %s", done, steps, rate, parts)
        if done % save_every == 0 and done < steps:
            _save(run, sampler, state, done)
            report(run, agreement, state[0])
    _save(run, sampler, state, done)
    export_head(run.out, state[0], run.head, run.raw_config, run.teacher.target_ids)
    logger.info("exported to %s; what follows is of the exported bfloat16 weights", run.out)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), state[0])
    report(run, agreement, rounded)
    trained: Params = state[0]
    return trained


def report(run: HeadRun, agreement: Agreement, params: Params) -> None:
    """Prints, per kind of held-out text, how often each draft's best token is the target's."""
    for name, rows in run.held_out.items():
        agreed = agreements(agreement, params, run.teacher.params, rows)
        parts = ", ".join(f"{100 * share:.1f} %" for share in agreed.mean(axis=(1, 2)))
        # Where the text is the target's own greedy choice this is exact; elsewhere it goes on from tokens that were not drafted.
        length = 1.0 + np.cumprod(agreed, axis=0).sum(axis=0).mean()
        logger.info(
            "held out, %s: best token of each draft is the target's: %s; tokens a round %.2f", name, parts, length
        )


def agreements(agreement: Agreement, params: Params, target_params: Params, rows: Ids) -> np.ndarray:
    """bool [J, B, P] for rows [B, L], a few rows at a time."""
    parts = []
    for start in range(0, len(rows), _ROWS_PER_CALL):
        part = rows[start : start + _ROWS_PER_CALL]
        filled = np.resize(part, (_ROWS_PER_CALL, rows.shape[1]))
        parts.append(np.asarray(agreement(params, target_params, jnp.asarray(filled)))[:, : len(part)])
    return np.concatenate(parts, axis=1) if parts else np.zeros((NUM_UNROLLED, 0, 0), bool)


def _fresh(run: HeadRun, seed: int) -> Params:
    params = init_eagle_params(run.head, seed, np.float32)
    params.pop(DRAFT_COLUMNS, None)  # the export writes it; there is nothing to learn in it
    return fresh_head(run.head, run.teacher, params)


def _resume(run: HeadRun, sampler: Sampler) -> tuple[TrainState, int]:
    with run.state_file.open("rb") as file:  # only ever a file that `_save` wrote
        saved = pickle.load(file)
    sampler.counters.update(saved["counters"])
    logger.info("resuming at step %d", saved["done"])
    return jax.tree.map(jnp.asarray, saved["state"]), saved["done"]


def _save(run: HeadRun, sampler: Sampler, state: TrainState, done: int) -> None:
    saved = {"state": jax.tree.map(np.asarray, state), "counters": sampler.counters, "done": done}
    staging = run.state_file.with_suffix(".new")
    with staging.open("wb") as file:
        pickle.dump(saved, file)
    staging.replace(run.state_file)
