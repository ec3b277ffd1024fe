"""The engines that are compared: how each is started, on what form of the checkpoint, and in which environment.

A peer is a line in `PEERS`, a file in drivers/ and an entry in `environments.ENVIRONMENTS`.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.bench.peers.environments import python_of
from quire.bench.peers.session import log_tail
from quire.kernels.errors import InvalidConfigError

DRIVERS = Path(__file__).parent / "drivers"
QUIRE = "quire"
PREPARE_SECONDS = 1800


@dataclass(frozen=True)
class Conversion:
    """A script that makes another form of a checkpoint (`SCRIPT FOLDER RESULT`), and the environment that it runs in."""

    script: str
    environment: str
    result: str  # beside the checkpoint's folder


@dataclass(frozen=True)
class Peer:
    """How one peer is run. In `variables`, {threads}, {cache} and {environment} stand for a number and two folders."""

    title: str
    driver: str
    package: str
    conversion: Conversion | None = None
    variables: tuple[str, ...] = ()


COMMON_VARIABLES = ("OMP_NUM_THREADS={threads}", "HF_HUB_OFFLINE=1", "TOKENIZERS_PARALLELISM=false")
# In the order of the table.
PEERS = {
    "vllm": Peer(
        "vLLM",
        "vllm_engine.py",
        "vllm",
        variables=(
            "LD_PRELOAD={environment}/lib/libiomp5.so",
            "VLLM_CACHE_ROOT={cache}",
            "TORCHINDUCTOR_CACHE_DIR={cache}/inductor",
            "VLLM_NO_USAGE_STATS=1",
            "VLLM_ENABLE_V1_MULTIPROCESSING=0",
        ),
    ),
    "openvino": Peer(
        "OpenVINO",
        "openvino_batching.py",
        "openvino_genai",
        Conversion("export_openvino.py", "openvino-export", "openvino"),
    ),
    "llama.cpp": Peer(
        "llama.cpp", "llama_cpp_batches.py", "llama_cpp", Conversion("write_gguf.py", "llama.cpp", "model-bf16.gguf")
    ),
    "transformers": Peer("transformers", "transformers_generate.py", "torch"),
}
ENGINES = (QUIRE, *PEERS)


class UnavailableError(Exception):
    """An engine that cannot take part; says why."""


@dataclass(frozen=True)
class Contender:
    """An engine ready to be started: `name` in all results, the interpreter, the driver and what it loads."""

    name: str
    python: Path
    driver: Path
    model: Path
    variables: tuple[str, ...]
    arguments: dict[str, Any]

    @property
    def is_quire(self) -> bool:
        """Whether it is this engine, with whatever arguments."""
        return self.name.split()[0] == QUIRE

    def command(self, threads: int, cache: Path) -> list[str]:
        """What starts its process, compiled programs being kept in `cache`."""
        names = {"threads": threads, "cache": cache, "environment": self.python.parent.parent}
        variables = [variable.format(**names) for variable in (*COMMON_VARIABLES, *self.variables)]
        return ["env", *variables, str(self.python), str(DRIVERS / "serve.py"), str(self.driver)]


def quire_contender(model: Path, arguments: str) -> Contender:
    """This engine, by the interpreter that runs this, with further arguments of `LLM` in the form `name=value name=value`."""
    name = f"{QUIRE} {arguments}".strip()
    variables = ("QUIRE_CACHE={cache}",)
    return Contender(
        name, Path(sys.executable), DRIVERS / "quire_engine.py", model, variables, parse_arguments(arguments)
    )


def peer_contender(name: str, model: Path, folder: Path, log: Path) -> Contender:
    """A peer out of `folder`, its form of the checkpoint made if it is not there. Raises UnavailableError."""
    peer = PEERS[name]
    python = find_python(name, folder)
    if peer.conversion is not None:
        model = converted(peer.conversion, model, folder, log)
    return Contender(name, python, DRIVERS / peer.driver, model, peer.variables, {})


def find_python(name: str, folder: Path) -> Path:
    """The interpreter of a peer's environment, or this one if it has the peer's package. Raises UnavailableError."""
    if python := python_of(name, folder):
        return python
    if importlib.util.find_spec(PEERS[name].package) is not None:
        return Path(sys.executable)
    raise UnavailableError(
        f"not installed in {folder}; quire bench peers --install {shlex.quote(str(folder))} --peers {name}"
    )


def converted(conversion: Conversion, model: Path, folder: Path, log: Path) -> Path:
    """The checkpoint in a peer's form, made at most once for each checkpoint. Raises UnavailableError."""
    result = model.parent / conversion.result
    mark = model.parent / f"{conversion.result}.made"
    made_from = (model / "made_from.json").read_text() + (DRIVERS / conversion.script).read_text()
    if mark.is_file() and mark.read_text() == made_from and result.exists():
        return result
    python = python_of(conversion.environment, folder)
    if python is None:
        raise UnavailableError(f"converting the checkpoint needs {conversion.environment}, which is not in {folder}")
    print(f"converting the checkpoint: {conversion.script}", file=sys.stderr, flush=True)
    command = ["env", "HF_HUB_OFFLINE=1", str(python), str(DRIVERS / conversion.script), str(model), str(result)]
    try:
        with log.open("wb") as output:
            subprocess.run(command, check=True, stdout=output, stderr=output, timeout=PREPARE_SECONDS)
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"{conversion.script} failed: {log_tail(log)}") from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{conversion.script} took more than {PREPARE_SECONDS} s") from error
    mark.write_text(made_from)
    return result


def parse_arguments(text: str) -> dict[str, Any]:
    """`name=value name=value`, values as JSON or else as they stand. Raises InvalidConfigError."""
    found: dict[str, Any] = {}
    for part in shlex.split(text):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise InvalidConfigError(f"{part!r} is not of the form name=value, as in dtype=bfloat16")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def parse_names(text: str) -> Sequence[str]:
    """Names of engines, separated by commas. Raises InvalidConfigError for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in ENGINES]:
        raise InvalidConfigError(f"unknown {', '.join(unknown)}; there are {', '.join(ENGINES)}")
    return names
