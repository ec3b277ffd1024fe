"""neuronx-cc, AWS's compiler for NeuronCores: its flags, its command line, and libneuronxla's function around it.

Within the Neuron plugin it is the plugin that calls it, with the flags of $NEURON_CC_FLAGS. Programs that are compiled by themselves go
through the command, whose results are kept in a folder; where they are to be shared through s3://, or there is no command, through
libneuronxla, which keeps them as the plugin does.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quire.backends.rank_program import RankProgram
from quire.kernels.errors import BackendError

logger = logging.getLogger(__name__)

COMPILER = "neuronx-cc"
DEFAULT_FLAGS = ("--model-type=transformer", "--auto-cast=none")
"""A decoder's layout, and no conversion to another dtype behind our back."""
# What one compilation is taken to need of the host's memory. The documentation has no figure; too much here only means fewer at once.
COMPILE_BYTES = 8 << 30
# Read by what lies between the plugin and the compiler; neuronx-cc itself does not know them.
_WRAPPER_FLAGS = ("--retry_failed_compilation", "--no_cache", "--cache_dir")
_MAX_MESSAGE = 4000


def with_defaults(flags: Sequence[str], defaults: Sequence[str] = DEFAULT_FLAGS) -> list[str]:
    """`flags`, and those of `defaults` whose name is not among them."""
    names = {_name(flag) for flag in flags}
    return [*flags, *(flag for flag in defaults if _name(flag) not in names)]


def retried(flags: Sequence[str]) -> list[str]:
    """Flags for a second attempt: with less optimization, and looking anew at what failed, since failures are kept too."""
    kept = [flag for flag in flags if _name(flag) not in ("--optlevel", "-O", "-O1", "-O2", "-O3")]
    return [*with_defaults(kept, ["--retry_failed_compilation"]), "--optlevel=1"]


def compile_slots(free_bytes: int, processors: int) -> int:
    """How many compilations this host has room for at once."""
    return max(1, min(processors, free_bytes // COMPILE_BYTES))


@dataclass(frozen=True)
class NeuronCompiler:
    """neuronx-cc. What the command made is kept in a folder, by program, flags and version; failures are not."""

    target: str
    """inf2, trn1, trn1n, trn2 or trn3."""
    logical_cores: int = 1
    """Physical cores that one program runs on."""
    flags: tuple[str, ...] = DEFAULT_FLAGS
    cache: str | None = None
    """A folder, or an s3:// address; None keeps nothing."""

    @staticmethod
    def is_installed() -> bool:
        """Whether the command is on the path, or libneuronxla can be imported."""
        return shutil.which(COMPILER) is not None or _in_process() is not None

    def command(self, hlo: Path, neff: Path, flags: Sequence[str]) -> list[str]:
        """The command line that makes a NEFF of a serialized HloModuleProto."""
        own = [flag for flag in flags if _name(flag) not in _WRAPPER_FLAGS]
        own = self._with_cores(own)
        return [
            *(COMPILER, "compile", str(hlo), "--framework", "XLA", "--target", self.target, "--output", str(neff)),
            *own,
        ]

    def compile(self, program: RankProgram, name: str) -> bytes:
        """The NEFF of a program; `name` is for messages.

        Tried again with less optimization where it fails. Raises BackendError with the compiler's words when that fails too, or when
        there is no compiler.
        """
        if not self.is_installed():
            raise BackendError(
                f"{COMPILER} is not on the path, and {name} has to be compiled: install AWS's Neuron packages, or compile elsewhere"
            )
        if shutil.which(COMPILER) is None or (self._is_remote and _in_process() is not None):
            return self._compile_in_process(program, name)
        kept = self._kept(program)
        if kept is not None and kept.is_file():
            return kept.read_bytes()
        try:
            neff = self._run(program.hlo, name, self.flags)
        except BackendError as error:
            logger.warning("%s; trying once more with less optimization", error)
            neff = self._run(program.hlo, name, retried(self.flags))
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            # Written beside and renamed, so that nobody reads half of one.
            with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as written:
                written.write(neff)
            os.replace(written.name, kept)
        return neff

    def _kept(self, program: RankProgram) -> Path | None:
        if self.cache is None or self._is_remote:
            return None
        key = self._key(program, (compiler_version(), *self.flags))
        return Path(self.cache) / "neff" / f"{key}.neff"

    @property
    def _is_remote(self) -> bool:
        return self.cache is not None and "://" in self.cache

    def _compile_in_process(self, program: RankProgram, name: str) -> bytes:
        """By libneuronxla, which keeps results, and failures, in its own cache."""
        compile_hlo = _in_process()
        assert compile_hlo is not None
        for flags in (self.flags, retried(self.flags)):
            own = self._with_cores([flag for flag in flags if _name(flag) not in _WRAPPER_FLAGS])
            try:
                neff: bytes = compile_hlo(
                    program.hlo,
                    own,
                    input_format="hlo",
                    platform_target=self.target,
                    cache_key=self._key(program, own),
                    retry_failed_compilation=flags is not self.flags,
                    lazy=True,
                    use_cache=self.cache is not None,
                    cache_dir=self.cache,
                )
                return neff
            except Exception as error:  # it raises what the compiler's failure becomes there
                said = " ".join(str(error).split())[-_MAX_MESSAGE:]
                failure = BackendError(
                    f"libneuronxla does not compile {name} for {self.target} ({' '.join(own)}): {said}"
                )
                if flags is not self.flags:
                    raise failure from error
                logger.warning("%s; trying once more with less optimization", failure)
        raise AssertionError("either returned or raised")

    def _key(self, program: RankProgram, flags: Sequence[str]) -> str:
        said = "\0".join((self.target, str(self.logical_cores), *flags, ""))
        return hashlib.sha256((said + program.text).encode()).hexdigest()

    def _with_cores(self, flags: Sequence[str]) -> list[str]:
        if self.logical_cores == 1:
            return list(flags)
        return with_defaults(flags, [f"--logical-nc-config={self.logical_cores}"])

    def _run(self, hlo: bytes, name: str, flags: Sequence[str]) -> bytes:
        with tempfile.TemporaryDirectory(prefix="quire-neuron-") as folder:
            graph, neff = Path(folder) / "graph.hlo.pb", Path(folder) / "graph.neff"
            graph.write_bytes(hlo)
            command = self.command(graph, neff, flags)
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode != 0 or not neff.is_file():
                said = (done.stderr.strip() or done.stdout.strip())[-_MAX_MESSAGE:] or "it said nothing"
                raise BackendError(
                    f"{COMPILER} does not compile {name} for {self.target} (exit status {done.returncode}, {' '.join(command[8:])}): {said}"
                )
            return neff.read_bytes()


def _in_process() -> Callable[..., bytes] | None:
    """libneuronxla's function that compiles, None where there is none."""
    try:
        package = importlib.import_module("libneuronxla")
    except ImportError:
        return None
    found: Callable[..., bytes] | None = getattr(package, "neuron_xla_compile", None)
    return found


@functools.cache
def compiler_version() -> str:
    """What the command says of itself. Raises BackendError where it does not run."""
    done = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BackendError(f"{COMPILER} --version fails: {done.stderr.strip()[-_MAX_MESSAGE:]}")
    return done.stdout.strip()


def _name(flag: str) -> str:
    return flag.partition("=")[0]
