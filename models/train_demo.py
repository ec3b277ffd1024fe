"""Trains the bundled demo pair, target and draft, on text that comes with Python.

    python -m quire.models.train_demo --minutes 90 --out models/demo

Runs on whatever device jax finds. The learning rate follows the time limit, so a stronger machine gives a better
pair. Progress is saved in the state folder; the same command resumes an interrupted run. Needs `quire[train]`.
"""

import argparse
import logging
from pathlib import Path

from tokenizers import Tokenizer

from quire.models.registry import load_config
from quire.models.training.batches import Sampler, Stream, encode_streams, held_out_rows, token_byte_lengths
from quire.models.training.corpus import Corpus, build_corpus
from quire.models.training.export import DRAFT_SIZE, TARGET_SIZE, hf_config, write_config
from quire.models.training.loop import SEED, Run, logger, train
from quire.models.training.step import Pair
from quire.models.training.tokenizer import train_tokenizer

HELD_OUT_ROWS = {"library": 32, "tests": 16, "prose": 12, "chat": 8}
HELD_OUT_LENGTH = 256


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=90.0, help="time to train for, resumed runs together (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="gets target/ and draft/ (%(default)s)")
    parser.add_argument("--state", type=Path, default=Path("demo-train"), help="folder to resume from (%(default)s)")
    parser.add_argument("--save-every", type=float, default=8.0, help="minutes between saves (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    args.state.mkdir(parents=True, exist_ok=True)

    logger.info("reading the standard library")
    corpus, held_out = build_corpus()
    tokenizer = _tokenizer(args.state / "tokenizer.json", corpus)
    streams = encode_streams(corpus, tokenizer, SEED)
    logger.info("training tokens: %s", ", ".join(f"{name} {len(stream.ids):,}" for name, stream in streams.items()))
    run = _prepare(args.out, args.state, tokenizer, encode_streams(held_out, tokenizer, None))
    train(run, Sampler(streams, SEED), minutes=args.minutes, save_every=args.save_every)


def _tokenizer(path: Path, corpus: Corpus) -> Tokenizer:
    """The tokenizer of an interrupted run, else a new one."""
    if not path.exists():
        documents = corpus.documents
        train_tokenizer(documents["library"] + documents["prose"] + documents["tests"][::4]).save(str(path))
    return Tokenizer.from_file(str(path))


def _prepare(out: Path, state: Path, tokenizer: Tokenizer, held_out: dict[str, Stream]) -> Run:
    raw = Pair(hf_config(TARGET_SIZE, tokenizer), hf_config(DRAFT_SIZE, tokenizer))
    write_config(state / "target", raw.target, tokenizer)
    write_config(state / "draft", raw.draft, tokenizer)
    configs = Pair(state / "target", state / "draft").map(load_config)
    rows = {name: held_out_rows(held_out[name], count, HELD_OUT_LENGTH) for name, count in HELD_OUT_ROWS.items()}
    rows = {name: found for name, found in rows.items() if len(found)}  # some Pythons come without their tests
    return Run(out, state / "state.pickle", tokenizer, raw, configs, rows, token_byte_lengths(tokenizer))


if __name__ == "__main__":
    main()
