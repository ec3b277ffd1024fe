"""`quire bench speculate`: tokens per second with and without speculation in one run, and what drafting in the step itself saves.

Two set-ups. A real pair of models, the bundled one unless others are named, on text that goes on as it began and on text that may go on
anyhow. Or, with `--acceptance`, a random pair whose drafts are accepted as often as is said, which shows what speculation would gain
with a draft model that good. Speculation never changes a token; that it did not is checked in every run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quire.backends.neuron import NeuronOptions
from quire.backends.select import select_backend
from quire.bench.peers.chart import require_matplotlib
from quire.bench.peers.rounds import say
from quire.bench.peers.shapes import SHAPES
from quire.bench.speculate.chart import write_chart
from quire.bench.speculate.contenders import NO_SPECULATION, Contender, Setup
from quire.bench.speculate.forced import DRAFT_SHAPES, MAKERS, ForcedBackend, make_target
from quire.bench.speculate.prompts import OPEN_ENDED, STRUCTURED, prompts_of, random_prompts
from quire.bench.speculate.report import break_evens, differing, tables
from quire.bench.speculate.rounds import Case, Measurement, Record, Workload
from quire.bench.speculate.unfused import compare_fused
from quire.engine.arguments import add_engine_flags, engine_arguments
from quire.engine.config import EngineConfig
from quire.engine.speculation import METHODS
from quire.engine.tokenizer import load_tokenizer
from quire.kernels.errors import InvalidConfigError
from quire.models.checkpoint import resolve_model
from quire.models.registry import load_config

DEFAULT_METHODS = ("draft_model", "ngram")
UNFUSED_BATCH_SIZES = (1, 8)
FORCED = "forced"
FORCED_PROMPT_LEN = 32
OWN_SETTINGS = ("speculative_config", "max_num_seqs", "max_model_len", "sampling")


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser("speculate", help="what speculative decoding gains, by method and batch size")
    parser.add_argument("--model", "-m", default="demo", help="(default: %(default)s)")
    parser.add_argument(
        "--draft-model", default="demo-draft", help="for the method of that name (default: %(default)s)"
    )
    parser.add_argument("--eagle-model", default="demo-eagle", help="the head for eagle3 (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help=f"(default: {' '.join(DEFAULT_METHODS)})")
    parser.add_argument("--num-speculative-tokens", type=int, nargs="+", metavar="K", help="(default: 2 4)")
    parser.add_argument(
        "--adaptive",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also let the engine choose, up to the largest K (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", metavar="N", help="(default: 1 2 4 8 16 32; forced: 1 2 4 8)"
    )
    parser.add_argument("--temperatures", type=float, nargs="+", metavar="T", help="(default: 0 0.8; forced: 0)")
    parser.add_argument("--kinds", nargs="+", choices=(STRUCTURED, OPEN_ENDED), default=[STRUCTURED, OPEN_ENDED])
    parser.add_argument("--max-tokens", type=int, help="of each output (default: 96; forced: 32)")
    parser.add_argument("--rounds", type=int, help="each contender once a round (default: 5; forced: 3)")
    parser.add_argument(
        "--engines",
        type=int,
        default=1,
        metavar="N",
        help="make every engine so many times, and share the rounds out among them: twins differ by a few percent for as long as they "
        "live, and an adaptive one may learn something wrong (default: %(default)s)",
    )
    parser.add_argument(
        "--acceptance",
        type=float,
        nargs="+",
        metavar="P",
        help="take a random target, and a random draft model or head, whose drafts are accepted with these probabilities",
    )
    parser.add_argument("--shape", choices=tuple(DRAFT_SHAPES), help="of the random target (default: llama-135m)")
    parser.add_argument(
        "--unfused", action="store_true", help="also measure the round as two dispatches with the host in between"
    )
    parser.add_argument(
        "--quick", action="store_true", help="as little as shows that it works: the figures say nothing"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines in the place of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the figures")
    parser.add_argument(
        "--read", type=Path, nargs="+", metavar="FILE", help="run nothing: tables and plot of what --json has printed"
    )
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Measures and reports; 1 where tokens differ that must not."""
    if namespace.plot is not None:
        require_matplotlib()
        if not namespace.plot.absolute().parent.is_dir():
            raise InvalidConfigError(f"{namespace.plot} cannot be written: {namespace.plot.parent} is not a folder")
    if namespace.read is not None:
        return _report([record for path in namespace.read for record in _read(path)], namespace)
    _fill_in(namespace)
    setup, workload, cases = (_forced if namespace.acceptance else _real)(namespace)
    records: list[Record] = []

    def add(found: Sequence[Record]) -> None:
        for record in found:
            records.append({**_about(namespace, setup, contenders[0].llm), **record})
            if namespace.json:
                print(json.dumps(records[-1]), flush=True)

    measurements = [Measurement(case, workload) for case in cases]
    contenders: list[Contender] = []
    for idx in range(1, namespace.engines + 1):
        contenders.clear()  # their memory is the next ones'
        contenders += setup.make(say)
        rounds = range((idx - 1) * namespace.rounds // namespace.engines, idx * namespace.rounds // namespace.engines)
        for measurement in measurements:
            measurement.measure(contenders, rounds, say)
            if idx == namespace.engines:
                add(measurement.records(contenders))
    add(break_evens(records))
    if namespace.unfused:
        most = max(namespace.num_speculative_tokens)
        few_and_many = _unfused_cases(cases, max(namespace.batch_sizes))
        for contender in contenders:
            if contender.method != NO_SPECULATION and contender.num_drafts == most:
                add(compare_fused(contender, few_and_many, workload, 2 * namespace.rounds, say))
    return _report(records, namespace)


def _fill_in(namespace: argparse.Namespace) -> None:
    """Decides what was not said. Raises InvalidConfigError for what cannot be measured."""
    is_forced, is_quick = bool(namespace.acceptance), namespace.quick
    defaults: dict[str, Any] = {
        "methods": ["draft_model"] if is_forced else list(DEFAULT_METHODS),
        "num_speculative_tokens": [2] if is_quick else [4] if is_forced else [2, 4],
        "batch_sizes": [1, 2] if is_quick else [1, 2, 4, 8] if is_forced else [1, 2, 4, 8, 16, 32],
        "temperatures": [0.0] if is_forced else [0.0, 0.8],
        "max_tokens": 32 if is_quick else 32 if is_forced else 96,
        "rounds": 2 if is_quick else 3 if is_forced else 5,
        "shape": "tiny" if is_quick else "llama-135m",
    }
    for name, value in defaults.items():
        if getattr(namespace, name) is None:
            setattr(namespace, name, value)
    for name in ("num_speculative_tokens", "batch_sizes", "max_tokens", "rounds"):
        values = getattr(namespace, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise InvalidConfigError(f"{name} must be at least 1, not {values}")
    if not 1 <= namespace.engines <= namespace.rounds:
        raise InvalidConfigError(
            f"engines must lie between 1 and rounds, which is {namespace.rounds}, and not be {namespace.engines}"
        )
    if any(not 0.0 <= acceptance <= 1.0 for acceptance in namespace.acceptance or ()):
        raise InvalidConfigError(f"acceptance is a probability, from 0 to 1, not {namespace.acceptance}")
    if is_forced and (others := sorted(set(namespace.methods) - MAKERS.keys())):
        raise InvalidConfigError(
            f"only the drafts of {' and '.join(MAKERS)} can be forced: leave {', '.join(others)} out, or acceptance"
        )
    if given := sorted(set(OWN_SETTINGS) & set(engine_arguments(namespace))):
        raise InvalidConfigError(f"{', '.join(given)} cannot be given: the benchmark sets it for each engine")


def _arguments(namespace: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    """Of every engine: float32 unless asked for otherwise, since there equal tokens can be demanded."""
    given = {name: value for name, value in engine_arguments(namespace).items() if name != "model"}
    sizes = {"max_num_seqs": max(namespace.batch_sizes), "max_model_len": workload.longest + 1, "sampling": "random"}
    return {"dtype": "float32", **given, **sizes}


def _real(namespace: argparse.Namespace) -> tuple[Setup, Workload, list[Case]]:
    arguments = engine_arguments(namespace)
    tokenizer = load_tokenizer(resolve_model(arguments.get("tokenizer") or namespace.model))
    most = max(namespace.batch_sizes)
    workload = Workload({kind: prompts_of(kind, most, tokenizer) for kind in namespace.kinds}, namespace.max_tokens)
    cases = [
        Case(kind, batch_size, temperature)
        for kind in namespace.kinds
        for temperature in namespace.temperatures
        for batch_size in namespace.batch_sizes
    ]
    draft_models = {"draft_model": namespace.draft_model, "eagle3": namespace.eagle_model}
    return _setup(namespace, namespace.model, draft_models, workload, None), workload, cases


def _forced(namespace: argparse.Namespace) -> tuple[Setup, Workload, list[Case]]:
    arguments = engine_arguments(namespace)
    if arguments.get("tensor_parallel_size", 1) != 1:
        raise InvalidConfigError("acceptance is forced on one device only: leave out tensor_parallel_size")
    target, shape = make_target(namespace.shape), SHAPES[namespace.shape]
    draft_models = {method: str(MAKERS[method](target)) for method in namespace.methods}
    acceptances = tuple(namespace.acceptance)
    prompts = random_prompts(max(namespace.batch_sizes), FORCED_PROMPT_LEN, shape.vocab_size)
    workload = Workload({FORCED: prompts}, namespace.max_tokens, acceptances)
    cases = [
        Case(FORCED, batch_size, temperature, acceptance)
        for temperature in namespace.temperatures
        for batch_size in namespace.batch_sizes
        for acceptance in acceptances
    ]
    device = EngineConfig.from_arguments(**arguments).device
    neuron = NeuronOptions(
        emulate=device.emulate, runtime=device.neuron_runtime, logical_cores=device.neuron_logical_cores
    )
    backend = ForcedBackend(
        select_backend(device.device, 1, neuron), acceptances, lambda config: config.num_layers != shape.num_layers
    )
    return _setup(namespace, str(target), draft_models, workload, backend), workload, cases


def _setup(
    namespace: argparse.Namespace,
    model: str,
    draft_models: dict[str, str],
    workload: Workload,
    backend: ForcedBackend | None,
) -> Setup:
    positions = load_config(resolve_model(model)).max_position_embeddings
    if workload.longest >= positions:
        longest_prompt = workload.longest - workload.max_tokens
        room = positions - 1 - longest_prompt
        raise InvalidConfigError(
            f"max_tokens={workload.max_tokens} after prompts of {longest_prompt} tokens is beyond the {positions} positions that {model} "
            f"was made for: {f'lower it to {room}' if room > 0 else 'take another model'}"
        )
    return Setup(
        model=model,
        draft_models=draft_models,
        methods=tuple(namespace.methods),
        draft_counts=tuple(namespace.num_speculative_tokens),
        is_adaptive=namespace.adaptive,
        arguments=_arguments(namespace, workload),
        backend=backend,
    )


def _unfused_cases(cases: Sequence[Case], max_batch_size: int) -> list[Case]:
    """A small and a larger batch of the first kind, at the lowest temperature and the lowest forced acceptance, which takes most rounds."""
    temperature = min(case.temperature for case in cases)
    acceptances = [case.acceptance for case in cases if case.acceptance is not None]
    sizes = sorted({min(size, max_batch_size) for size in UNFUSED_BATCH_SIZES})
    return [Case(cases[0].kind, size, temperature, min(acceptances, default=None)) for size in sizes]


def _about(namespace: argparse.Namespace, setup: Setup, llm: Any) -> Record:
    """What all records of a run have in common."""
    return {
        "model": namespace.shape if namespace.acceptance else setup.model,
        "dtype": llm.core.config.dtype,
        "device": llm.core.capabilities.device_kind,
        "max_tokens": namespace.max_tokens,
    }


def _report(records: Sequence[Record], namespace: argparse.Namespace) -> int:
    """Prints and draws what there is; 1 where float32 tokens differ."""
    if not namespace.json:
        print(tables(records))
    if namespace.plot is not None:
        write_chart(records, namespace.plot)
        say(f"drawn: {namespace.plot}")
    wrong = differing(record for record in records if record.get("dtype") == "float32")
    for sentence in wrong:
        say(f"error: speculation changed what is generated: {sentence}")
    return int(bool(wrong))


def _read(path: Path) -> list[Record]:
    """The records in a file. Raises InvalidConfigError."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    except (OSError, ValueError) as error:
        raise InvalidConfigError(f"{path} cannot be read: {error}") from error
    if not any(record.get("benchmark") == "speculate" for record in records):
        raise InvalidConfigError(f"{path} does not hold JSON lines of quire bench speculate")
    return records
