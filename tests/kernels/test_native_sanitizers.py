"""The native kernels under the sanitizers of addresses and of undefined behaviour, and their threads under that of races.

Each report ends the process that it is about, so the tests fail by its exit status and show what it said.
"""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jaxlib
import pytest
import setuptools

from quire.kernels.native import library
from tests.kernels.native import CONTEXT

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
BEST = next((name for name in library.INSTRUCTION_SETS if library.refuses(name, CONTEXT) is None), "portable")
SUITES = ("test_linear.py", "test_paged_attention_native.py", "test_decoder_layer.py", "test_draft_head.py")

# Runs the suites with libraries from a folder of their own; the kernels of other instruction sets are not found there. Each packed
# matrix gets memory of its own, since within an arena the sanitizer does not see where one ends; what it reports is not captured.
RUN = """
import sys
from pathlib import Path
import numpy as np
from quire.kernels.native import library, memory
memory.Arena.empty = lambda self, shape, dtype: np.empty(shape, dtype)
library.library_path = lambda name: Path(sys.argv[1]) / f"quire_cpu_{name}.so"
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=sys", "-m", "not slow", *sys.argv[2:]]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None or platform.system() != "Linux", reason="needs g++ on Linux"),
]


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout


def runtime(name: str) -> str:
    """Where the compiler keeps a library that must be there before the program starts."""
    return run(COMPILER, f"-print-file-name={name}").strip()


@pytest.mark.parametrize("instruction_set", sorted({"portable", BEST}))
def test_no_kernel_leaves_its_memory_or_what_is_defined(instruction_set: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)  # only the flags are wanted
    monkeypatch.chdir(ROOT)
    flags = runpy.run_path(str(ROOT / "setup.py"))["INSTRUCTION_SETS"][instruction_set]
    run(
        COMPILER,
        *["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing"],
        *["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"],
        *flags,
        f"-I{ROOT / 'kernels' / 'native'}",
        f"-isystem{Path(jaxlib.__file__).parent / 'include'}",
        *sorted(ROOT.glob("kernels/*/cpu.cc")),
        "-o",
        tmp_path / f"quire_cpu_{instruction_set}.so",
    )
    tests = [ROOT / "tests" / "kernels" / name for name in SUITES]
    output = run(
        *(sys.executable, "-c", RUN, tmp_path, "-k", instruction_set, *tests),
        # jaxlib throws exceptions, which the sanitizer can follow only where the C++ library is loaded before it.
        LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None
    assert int(passed[1]) > 100, output


def test_threads_that_share_loops_have_no_races(tmp_path: Path) -> None:
    """With threads of the test's own in place of XLA's, whose locks the sanitizer cannot see."""
    program = tmp_path / "threads"
    sources = Path(__file__).parent / "thread_sanitizer"
    includes = (f"-I{sources}", f"-I{ROOT / 'kernels' / 'native'}")
    flags = ["-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread"]
    run(COMPILER, *flags, *includes, sources / "main.cc", "-o", program)
    assert run(program, TSAN_OPTIONS="halt_on_error=1") == "0 wrong, helped yes\n"
