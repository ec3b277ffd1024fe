"""The training loop: both models in one step, saved regularly, resumed if interrupted, reported on held-out text."""

import logging
import pickle
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from quire.models.config import ModelConfig
from quire.models.params import init_params
from quire.models.training.batches import Ids, Sampler
from quire.models.training.evaluate import Loss, Scores, make_sampler, make_token_scores, score
from quire.models.training.export import export_model
from quire.models.training.schedule import learning_rate_factor, row_length
from quire.models.training.step import Pair, Params, TrainState, make_optimizer, make_train_step
from quire.models.training.tokenizer import END_OF_TEXT, END_OF_TURN

logger = logging.getLogger("quire.train_demo")

SEED = 0
TOKENS_PER_STEP = 3072
PROMPTS = (
    "def ",
    "class ",
    "import ",
    "for i in range(",
    "<|user|>\nWhat does os.path.join do?<|end|>\n<|assistant|>\n",
)
_SAMPLE_TOKENS = 100


@dataclass
class Progress:
    """What must survive an interruption besides parameters, optimizer state and the sampler's counters."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Run:
    """What stays the same for the whole run. `held_out` has rows [B, S + 1] per stream."""

    out: Path
    state_file: Path
    tokenizer: Tokenizer
    raw_configs: Pair[dict[str, Any]]
    configs: Pair[ModelConfig]
    held_out: Mapping[str, Ids]
    byte_lengths: NDArray[np.float64]


def train(run: Run, sampler: Sampler, *, minutes: float, save_every: float) -> None:
    """Trains until the time is up, then exports, and reports on what was exported. Both times in minutes."""
    states, progress = _resume(run, sampler) if run.state_file.exists() else (_fresh(run), Progress())
    sizes = states.map(lambda state: sum(leaf.size for leaf in jax.tree.leaves(state[0])))
    logger.info("parameters: target %s, draft %s", f"{sizes.target:,}", f"{sizes.draft:,}")
    train_step = make_train_step(run.configs, states.map(lambda state: make_optimizer(state[0])))
    scores = run.configs.map(make_token_scores)
    last, last_save, averages = time.monotonic(), progress.seconds, None
    while (share := progress.seconds / (60.0 * minutes)) < 1.0:
        length = row_length(share)
        rows = sampler.batch(progress.steps, TOKENS_PER_STEP // length, length)
        target, draft, *losses = train_step(
            states.target, states.draft, jnp.asarray(rows), jnp.float32(learning_rate_factor(share))
        )
        states = Pair(target, draft)
        latest = np.array([float(loss) for loss in losses])
        averages = latest if averages is None else 0.95 * averages + 0.05 * latest
        taken, last = time.monotonic() - last, time.monotonic()
        num_tokens = rows[:, 1:].size
        progress = Progress(progress.steps + 1, progress.tokens + num_tokens, progress.seconds + taken)
        if progress.steps % 10 == 0 or progress.steps == 1:
            logger.info(
                "step %d, %.1f of %g min, %s tokens, %.0f tokens/s, train loss: target %.3f, draft %.3f",
                progress.steps, progress.seconds / 60, minutes, f"{progress.tokens:,}", num_tokens / taken, *averages,
            )  # fmt: skip
        if progress.seconds - last_save > 60 * save_every:
            last_save = progress.seconds
            _save(run, sampler, states, progress)
            _report_held_out(run, scores, states.map(lambda state: state[0]))
            _export(run, states)
    _save(run, sampler, states, progress)
    _export(run, states)
    _final_report(run, scores, states, progress)


def _fresh(run: Run) -> Pair[TrainState]:
    def start(config_and_seed: tuple[ModelConfig, int]) -> TrainState:
        params = init_params(config_and_seed[0], config_and_seed[1], "float32", stacked=False)
        return params, make_optimizer(params).init(params)

    return run.configs.zip(Pair(SEED, SEED + 1)).map(start)


def _resume(run: Run, sampler: Sampler) -> tuple[Pair[TrainState], Progress]:
    with run.state_file.open("rb") as file:  # only ever a file that `_save` wrote
        saved = pickle.load(file)
    sampler.counters.update(saved["counters"])
    progress = Progress(**saved["progress"])
    logger.info("resuming at step %d", progress.steps)
    return Pair(*jax.tree.map(jnp.asarray, saved["states"])), progress


def _save(run: Run, sampler: Sampler, states: Pair[TrainState], progress: Progress) -> None:
    saved = {
        "states": jax.tree.map(np.asarray, (states.target, states.draft)),
        "counters": sampler.counters,
        "progress": asdict(progress),
    }
    staging = run.state_file.with_suffix(".new")
    with staging.open("wb") as file:
        pickle.dump(saved, file)
    staging.replace(run.state_file)


def _export(run: Run, states: Pair[TrainState]) -> None:
    for name in ("target", "draft"):
        state, config, raw = (getattr(pair, name) for pair in (states, run.configs, run.raw_configs))
        export_model(run.out / name, state[0], config, raw, run.tokenizer)
    logger.info("exported to %s", run.out)


def _report_held_out(run: Run, scores: Pair[Scores], params: Pair[Params]) -> None:
    """Prints the held-out losses, per stream and over all, and how often the draft's best token is the target's."""
    best = {}
    for name in ("target", "draft"):
        results = {
            stream: score(getattr(scores, name), getattr(params, name), rows, run.byte_lengths)
            for stream, rows in run.held_out.items()
        }
        best[name] = np.concatenate([tokens for _, tokens in results.values()])
        total = sum((loss for loss, _ in results.values()), Loss(0.0, 0, 0.0))
        parts = ", ".join(f"{stream} {loss.nats_per_token:.3f}" for stream, (loss, _) in results.items())
        logger.info(
            "held out, %s: %.3f nats/token, %.3f bits/byte (%s)",
            name, total.nats_per_token, total.bits_per_byte, parts,
        )  # fmt: skip
    agreement = float(np.mean(best["target"] == best["draft"]))
    logger.info("held out, draft's best token is the target's: %.1f %%", 100 * agreement)


def _final_report(run: Run, scores: Pair[Scores], states: Pair[TrainState], progress: Progress) -> None:
    logger.info(
        "done: %d steps, %s tokens in %.1f min, %.0f tokens/s; what follows is of the exported bfloat16 weights",
        progress.steps, f"{progress.tokens:,}", progress.seconds / 60, progress.tokens / progress.seconds,
    )  # fmt: skip
    rounded = states.map(lambda state: jax.tree.map(_through_bfloat16, state[0]))
    _report_held_out(run, scores, rounded)
    ends = [run.tokenizer.token_to_id(END_OF_TEXT), run.tokenizer.token_to_id(END_OF_TURN)]
    sample = make_sampler(run.configs.target, run.tokenizer)
    for prompt in PROMPTS:
        for temperature in (0.0, 0.8):
            text = sample(rounded.target, prompt, _SAMPLE_TOKENS, temperature, SEED, ends)
            logger.info("sample at temperature %g:\n%s\n", temperature, text)


def _through_bfloat16(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16).astype(jnp.float32)
