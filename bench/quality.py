"""`quire bench quality`: what a dtype or a quantization costs in quality, as perplexity on text that the model was not trained on.

Each variant is an engine with arguments of its own; all see the same token ids, in pieces of one length, and give the log-probability of
every token after a piece's first. The first variant is the one that the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quire.engine import LLM, SamplingParams
from quire.engine.arguments import add_engine_flags, engine_arguments
from quire.engine.tokenizer import Tokenizer, load_tokenizer
from quire.kernels.errors import InvalidConfigError
from quire.models.checkpoint import resolve_model

DEFAULT_VARIANTS = ("dtype=bfloat16", "dtype=bfloat16 quantization=int8")
PIECES_AT_ONCE = 64


@dataclass(frozen=True)
class Score:
    """Sums over tokens of text."""

    nats: float
    num_tokens: int
    best_tokens: tuple[int, ...]
    """The likeliest token at each place, in order."""
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token."""
        return math.exp(self.nats / self.num_tokens)


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser("quality", help="perplexity of dtypes and quantizations, side by side")
    parser.add_argument(
        "--model", "-m", default="demo", help="Hugging Face id, folder, demo or demo-draft (default: demo)"
    )
    parser.add_argument(
        "--variant",
        action="append",
        metavar="NAME=VALUE ...",
        help=f"engine arguments of one variant, the first is compared with; repeat (default: {', '.join(DEFAULT_VARIANTS)})",
    )
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        metavar="FILE",
        help="text to score; repeat (default: the files of Python's standard library that demo was not trained on)",
    )
    parser.add_argument(
        "--num-tokens", type=int, default=16384, help="most tokens that are scored (default: %(default)s)"
    )
    parser.add_argument("--piece-len", type=int, default=256, help="tokens of one piece of text (default: %(default)s)")
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Scores every variant and prints the line."""
    if namespace.piece_len < 2 or namespace.num_tokens < 2:
        raise InvalidConfigError(
            "piece_len and num_tokens must be at least 2: the first token of a piece is not scored"
        )
    common = {key: value for key, value in engine_arguments(namespace).items() if key != "model"}
    variants = [_arguments(text) for text in namespace.variant or DEFAULT_VARIANTS]
    tokenizer = load_tokenizer(resolve_model(common.get("tokenizer") or namespace.model))
    pieces = text_pieces(_read(namespace.text), tokenizer, namespace.piece_len, namespace.num_tokens)
    scores = []
    for arguments in variants:
        print(f"scoring {_name(arguments)}", file=sys.stderr)
        scores.append(score(namespace.model, {**common, **arguments}, pieces))
    print(json.dumps(_report(namespace.model, variants, scores, namespace.piece_len)))
    return 0


def text_pieces(texts: Sequence[str], tokenizer: Tokenizer, piece_len: int, num_tokens: int) -> list[list[int]]:
    """Token ids of the texts in pieces of one length, evenly from all of them; what is shorter is left out.

    Raises InvalidConfigError when nothing is long enough.
    """
    per_text = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    pieces = [
        ids[start : start + piece_len] for ids in per_text for start in range(0, len(ids) - piece_len + 1, piece_len)
    ]
    if not pieces:
        raise InvalidConfigError(f"no text has {piece_len} tokens; give longer text or a smaller piece_len")
    wanted = max(1, num_tokens // piece_len)
    step = max(1, len(pieces) // wanted)
    return pieces[::step][:wanted]


def score(model: str, arguments: dict[str, Any], pieces: Sequence[Sequence[int]]) -> Score:
    """The loss of an engine with these arguments over the pieces."""
    llm = LLM(model, **{"max_model_len": len(pieces[0]) + 1, "enable_prefix_caching": False, **arguments})
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    nats, best = 0.0, []
    begin = time.perf_counter()
    for first in tqdm(range(0, len(pieces), PIECES_AT_ONCE), desc="pieces", disable=None, unit_scale=PIECES_AT_ONCE):
        some = pieces[first : first + PIECES_AT_ONCE]
        for output in llm.generate([{"prompt_token_ids": list(piece)} for piece in some], params, use_tqdm=False):
            assert output.prompt_logprobs is not None
            for token, logprobs in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
                assert logprobs is not None
                nats -= logprobs[token].logprob
                best.append(max(logprobs, key=lambda id: logprobs[id].logprob))
    return Score(nats, len(best), tuple(best), time.perf_counter() - begin)


def _report(model: str, variants: Sequence[dict[str, str]], scores: Sequence[Score], piece_len: int) -> dict[str, Any]:
    base = scores[0]
    rows = [
        {
            "variant": _name(arguments),
            "nats_per_token": round(one.nats / one.num_tokens, 5),
            "perplexity": round(one.perplexity, 4),
            "perplexity_ratio": round(one.perplexity / base.perplexity, 5),
            "same_best_token": round(
                sum(a == b for a, b in zip(one.best_tokens, base.best_tokens, strict=True)) / one.num_tokens, 4
            ),
            "seconds": round(one.seconds, 2),
        }
        for arguments, one in zip(variants, scores, strict=True)
    ]
    return {"benchmark": "quality", "model": model, "tokens": base.num_tokens, "piece_len": piece_len, "variants": rows}


def _arguments(text: str) -> dict[str, str]:
    """`name=value name=value` as arguments of LLM. Raises InvalidConfigError for anything else."""
    pairs = [part.split("=", 1) for part in text.split()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise InvalidConfigError(f"variant {text!r} is not of the form name=value, several separated by spaces")
    return {name.replace("-", "_"): value for name, value in pairs}


def _name(arguments: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in arguments.items())


def _read(paths: Sequence[Path] | None) -> list[str]:
    if not paths:
        # Here, since it reads the whole standard library.
        from quire.models.training.corpus import build_corpus

        _, held_out = build_corpus()
        return [document for documents in held_out.documents.values() for document in documents]
    try:
        return [path.read_text(encoding="utf-8") for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfigError(f"the text cannot be read: {error}") from error
