"""`quire generate`: complete prompts from the command line, a file or standard input."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quire.engine import LLM, InvalidRequestError, RequestOutput, RequestOutputKind, SamplingParams
from quire.engine.arguments import add_engine_flags, engine_arguments
from quire.engine.device_state import sampling_mode

# Flags for what is asked most; --params takes all the rest as JSON.
_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("max_tokens", int, "most tokens to generate (default: 128)"),
    ("temperature", float, "0 takes the most likely token (default: 0)"),
    ("top_p", float, "sample among the most likely tokens that make up this share"),
    ("top_k", int, "sample among so many of the most likely tokens"),
    ("n", int, "completions of each prompt"),
)


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "generate",
        help="complete prompts",
        description="Complete prompts. Text is shown as it comes for a single prompt, in order for several.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        default="demo",
        metavar="MODEL",
        help="Hugging Face id, folder, demo or demo-draft (default: demo)",
    )
    parser.add_argument(
        "-p",
        "--prompt",
        action="append",
        dest="prompts",
        help="a prompt; may be given several times (default: standard input)",
    )
    parser.add_argument(
        "-f", "--file", type=Path, help="a file with a prompt a line, or a JSON object a line ({'prompt': ...})"
    )
    parser.add_argument(
        "--chat", action="store_true", help="each prompt is what a user says, in the model's chat template"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of text")
    parser.add_argument("--stop", action="append", help="a string to stop at; may be given several times")
    parser.add_argument("--sampling-seed", type=int, help="seed of the sampling")
    parser.add_argument(
        "--params", default="{}", help="more sampling parameters as a JSON object, spelled as SamplingParams"
    )
    for name, kind, text in _FLAGS:
        parser.add_argument("--" + name.replace("_", "-"), type=kind, dest=name, help=text)
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Loads the model, completes the prompts, prints."""
    prompts = _read_prompts(namespace)
    params = _sampling_params(namespace)
    settings = engine_arguments(namespace)
    # Shapes are compiled for the widest batch: a handful of prompts needs no more rows than it has.
    settings.setdefault("max_num_seqs", min(len(prompts) * params.n, 32))
    settings.setdefault("sampling", sampling_mode(params).name.lower() if params.prompt_logprobs is None else "full")
    llm = LLM(**settings)
    if namespace.chat:
        prompts = [{"prompt_token_ids": _chat_prompt(llm, prompt)} for prompt in prompts]
    if namespace.json:
        _print_json(llm.stream(prompts, dataclasses.replace(params, output_kind=RequestOutputKind.FINAL_ONLY)))
        return 0
    _print_stream(llm.stream(prompts, params), prompts, params.n, show_prompt=not namespace.chat)
    return 0


def _read_prompts(namespace: argparse.Namespace) -> list[Any]:
    if namespace.file is not None and namespace.prompts:
        raise InvalidRequestError("give prompts with --prompt or in a file, not both")
    if any(character.isspace() for character in namespace.model):
        raise InvalidRequestError(
            f"{namespace.model!r} is no model; for a prompt: quire generate --prompt {namespace.model!r}"
        )
    if namespace.file is not None:
        try:
            lines = namespace.file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequestError(f"the prompts in {namespace.file} cannot be read: {error}") from error
        prompts = [_prompt_of_line(line) for line in lines if line.strip()]
        if not prompts:
            raise InvalidRequestError(f"{namespace.file} holds no prompt; write one a line")
        return prompts
    if namespace.prompts:
        return list(namespace.prompts)
    if sys.stdin.isatty():
        print("reading the prompt from standard input; end it with Ctrl-D", file=sys.stderr)
    text = sys.stdin.read()
    if not text:
        raise InvalidRequestError("standard input is empty; give a prompt: quire generate --prompt 'def fibonacci(n):'")
    return [text]


def _prompt_of_line(line: str) -> Any:
    if not line.lstrip().startswith("{"):
        return line
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"a line that begins with {{ is no JSON object ({error}): {line[:80]!r}") from error


def _sampling_params(namespace: argparse.Namespace) -> SamplingParams:
    try:
        extra = json.loads(namespace.params)
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"--params is no JSON object ({error}): {namespace.params!r}") from error
    if not isinstance(extra, dict):
        raise InvalidRequestError(f"--params is no JSON object: {namespace.params!r}")
    given = {name: getattr(namespace, name) for name, _, _ in _FLAGS if getattr(namespace, name) is not None}
    if namespace.stop:
        given["stop"] = namespace.stop
    if namespace.sampling_seed is not None:
        given["seed"] = namespace.sampling_seed
    known = {field.name for field in dataclasses.fields(SamplingParams)} - {"output_kind"}
    unknown = sorted(set(extra) - known)
    if unknown:
        raise InvalidRequestError(f"--params: unknown {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    if isinstance(extra.get("logit_bias"), dict):
        try:  # JSON has no numbers for keys
            extra["logit_bias"] = {int(token_id): bias for token_id, bias in extra["logit_bias"].items()}
        except ValueError as error:
            raise InvalidRequestError(f"--params: the keys of logit_bias are token ids ({error})") from error
    wanted = {"max_tokens": 128, "temperature": 0.0, **extra, **given}
    return SamplingParams(**wanted, output_kind=RequestOutputKind.DELTA)


def _chat_prompt(llm: LLM, prompt: Any) -> list[int]:
    if llm.tokenizer is None:
        raise InvalidRequestError("--chat needs a tokenizer with a chat template; name one with --tokenizer")
    messages = prompt["messages"] if isinstance(prompt, dict) and "messages" in prompt else None
    return llm.tokenizer.apply_chat_template(messages or [{"role": "user", "content": prompt}])


def _print_stream(
    outputs: Iterator[RequestOutput], prompts: Sequence[Any], num_choices: int, *, show_prompt: bool
) -> None:
    """Prints the first unfinished completion as it comes and keeps what comes of later ones until its turn."""
    pieces: dict[tuple[int, int], list[str]] = {}
    done: set[int] = set()
    current, shown_choice = 0, -1
    many = len(prompts) > 1
    for output in outputs:
        prompt_idx = int(output.request_id)  # an engine numbers its requests, and these are its first
        for choice in output.outputs:
            pieces.setdefault((prompt_idx, choice.index), []).append(choice.text)
        if output.finished:
            done.add(prompt_idx)
        while current < len(prompts):
            for choice_idx in range(num_choices if current in done else 1):
                found = pieces.pop((current, choice_idx), None)
                if found is None and current not in done:
                    break  # nothing of it has come yet, or nothing new
                if choice_idx != shown_choice:
                    _print_heading(prompts[current], current, choice_idx, num_choices, many, show_prompt)
                    shown_choice = choice_idx
                print("".join(found or ()), end="", flush=True)
                if current in done:
                    print(flush=True)
            if current not in done:
                break
            current, shown_choice = current + 1, -1


def _print_heading(prompt: Any, idx: int, choice: int, num_choices: int, many: bool, show_prompt: bool) -> None:
    if many or num_choices > 1:
        which = f"{idx + 1}" + (f".{choice + 1}" if num_choices > 1 else "")
        print(f"--- {which}")
    text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
    if show_prompt and isinstance(text, str):
        print(text, end="", flush=True)


def _print_json(outputs: Iterator[RequestOutput]) -> None:
    """One object a line in the order of the prompts, each as soon as it and those before it have finished."""
    finished: dict[int, RequestOutput] = {}
    next_id = 0  # an engine numbers its requests, and these are its first
    for output in outputs:
        finished[int(output.request_id)] = output
        while next_id in finished:
            print(json.dumps(dataclasses.asdict(finished.pop(next_id)), ensure_ascii=False), flush=True)
            next_id += 1
