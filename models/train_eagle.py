"""Trains the EAGLE-3 head of the bundled target on text that comes with Python and on what the target writes itself.

    python -m quire.models.train_eagle --steps 700 --out models/demo/eagle

The target writes its continuations first; those decide which tokens the head can propose. What the head learns from is
the target's distribution after every token. The same steps and seed give the same head on the same machine. Progress is
saved in the state folder; the same command resumes an interrupted run. Needs `quire[train]`.
"""

import argparse
import json
import logging
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from quire.models.checkpoint import load_params, resolve_model
from quire.models.config import ModelConfig
from quire.models.params import Params
from quire.models.registry import load_config
from quire.models.train_demo import HELD_OUT_LENGTH, HELD_OUT_ROWS
from quire.models.training.batches import Ids, Sampler, encode_streams, held_out_rows
from quire.models.training.continuations import (
    LONGEST_PROMPT,
    as_stream,
    continuations,
    frequent_tokens,
    make_continue_rows,
)
from quire.models.training.corpus import STREAM_WEIGHTS, build_corpus
from quire.models.training.export import HEAD_SIZE, head_config, hf_head_config
from quire.models.training.head_loop import HeadRun, logger, train_head
from quire.models.training.head_step import Teacher

CAPTURED_LAYERS = (1, 3, 5)
OWN, OWN_SHARE = "own", 0.5
"""The stream of the target's own continuations, and its share of the training tokens."""
CONTINUATION_LENGTH = 256


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700, help="training steps, resumed runs together (%(default)s)")
    parser.add_argument("--continuations", type=int, default=1024, help="rows that the target writes (%(default)s)")
    parser.add_argument("--draft-vocab-size", type=int, default=1536, help="tokens of the head (%(default)s)")
    parser.add_argument("--target", default="demo", help="folder or name of the target (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("models/demo/eagle"), help="gets the head (%(default)s)")
    parser.add_argument("--state", type=Path, default=Path("eagle-train"), help="folder to resume from (%(default)s)")
    parser.add_argument("--save-every", type=int, default=100, help="steps between saves and reports (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of rows, continuations and first weights (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    args.state.mkdir(parents=True, exist_ok=True)

    folder = resolve_model(args.target)
    config = load_config(folder)
    params = load_params(folder, config, "float32", stacked=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    logger.info("reading the standard library")
    corpus, held_out_corpus = build_corpus()
    streams = encode_streams(corpus, tokenizer, args.seed)
    texts = {
        name: held_out_rows(stream, HELD_OUT_ROWS[name], HELD_OUT_LENGTH)
        for name, stream in encode_streams(held_out_corpus, tokenizer, None).items()
    }
    held_out = {"text": np.concatenate([rows for rows in texts.values() if len(rows)])}

    prompts = Sampler(streams, args.seed + 1).batch(0, args.continuations, LONGEST_PROMPT)[:, :LONGEST_PROMPT]
    own = _continued(args.state / "own.npy", config, params, prompts, args.seed)
    prompts = held_out["text"][:, :LONGEST_PROMPT]
    held_out["the target's own"] = _continued(args.state / "own-held-out.npy", config, params, prompts, args.seed + 1)
    target_ids, covered = frequent_tokens(own, args.draft_vocab_size, config.vocab_size)
    logger.info("the head's %d tokens are %.1f %% of what the target writes", len(target_ids), 100 * covered)

    raw_target = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw = hf_head_config(HEAD_SIZE, raw_target, args.draft_vocab_size, CAPTURED_LAYERS)
    teacher = Teacher(config, params, target_ids)
    run = HeadRun(args.out, args.state / "state.pickle", head_config(raw, config), raw, teacher, held_out)
    weights = {name: (1 - OWN_SHARE) * weight for name, weight in STREAM_WEIGHTS.items()} | {OWN: OWN_SHARE}
    sampler = Sampler({**streams, OWN: as_stream(own)}, args.seed, weights=weights)
    train_head(run, sampler, steps=args.steps, save_every=args.save_every, seed=args.seed)


def _continued(path: Path, config: ModelConfig, params: Params, prompts: Ids, seed: int) -> Ids:
    """The rows of an interrupted run, else new ones."""
    if not path.exists():
        logger.info("the target continues %d texts", len(prompts))
        np.save(path, continuations(make_continue_rows(config), params, prompts, CONTINUATION_LENGTH, seed))
    rows: Ids = np.load(path)
    return rows


if __name__ == "__main__":
    main()
