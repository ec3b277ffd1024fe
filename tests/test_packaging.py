"""The wheel: complete, under one import name, and usable away from the checkout. Needs no network."""

import fcntl
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from quire.kernels.native.library import INSTRUCTION_SETS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "backends", "kernels", "models", "server", "bench")
NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so")

# Prints where each module came from; `quire` itself is a namespace and has no file.
IMPORT_ALL = f"""
import importlib, sys
for package in {PACKAGES!r}:
    importlib.import_module("quire." + package)
from quire.server.cli import main
assert callable(main)
for name, module in sorted(sys.modules.items()):
    if name.startswith("quire."):
        print(module.__file__)
"""


def run(*arguments: str | Path, **options) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, stdin=subprocess.DEVNULL, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(folder: Path, *, compile_anew: bool = False, **environment: str) -> Path:
    """The wheel of a copy of the sources, so that neither side sees what the other leaves behind.

    The checkout's libraries were compiled by the same setup.py, and are taken over where they are newer than all that they are made of.
    """
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=NOT_SOURCE)
    if not compile_anew:
        libraries = source / "libraries" / "quire" / "kernels" / "native"
        libraries.mkdir(parents=True)
        for library in (ROOT / "kernels" / "native").glob("*.so"):
            shutil.copy2(library, libraries)
        (source / "setup.cfg").write_text("[build]\nbuild_lib = libraries\n")
    command = ("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, source)
    run(*command, env={**os.environ, **environment})
    (built,) = folder.glob("*.whl")
    return built


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, worker_id) -> Path:
    """Built once, also where several of pytest's processes want it."""
    if worker_id == "master":
        return build_wheel(tmp_path_factory.mktemp("wheel"))
    folder = tmp_path_factory.getbasetemp().parent / "wheel"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = list(folder.glob("*.whl"))
        return built[0] if built else build_wheel(folder)


@pytest.fixture(scope="module")
def files(wheel) -> set[str]:
    return names_in(wheel)


def expected(pattern: str) -> set[str]:
    """Names that the files matching a pattern in any package have in the wheel."""
    return {
        f"quire/{path.relative_to(ROOT).as_posix()}"
        for package in PACKAGES
        for path in (ROOT / package).rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_every_module_is_in_the_wheel(files):
    assert sorted(expected("*.py") - files) == []


def test_every_package_says_that_it_is_typed(files):
    assert {f"quire/{package}/py.typed" for package in PACKAGES} <= files


def test_the_sources_of_the_kernels_are_in_the_wheel(files):
    assert sorted((expected("*.cc") | expected("*.h")) - files) == []


def test_the_wheel_holds_the_kernels_for_every_instruction_set_and_is_tied_to_no_python(wheel, files):
    built = {Path(name).stem for name in files if name.endswith(".so")}
    names = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else ("portable",)
    assert built == {f"quire_cpu_{name}" for name in names}
    assert "-py3-none-" in wheel.name


@pytest.mark.slow
def test_a_wheel_compiled_from_its_sources_alone_holds_the_same(files, tmp_path):
    assert names_in(build_wheel(tmp_path, compile_anew=True)) == files


# Chosen by the package as it is installed, before a model is loaded; `false` as a compiler fails at everything.
DESCRIBE_OPS = """
from quire.kernels.op import OpContext
from quire.kernels.ops import choose_ops
print(choose_ops(OpContext("cpu", "cpu", "float32", num_heads=4, num_kv_heads=2, head_dim=16, block_size=16)).describe())
"""


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_built_without_kernels_and_works(files, tmp_path):
    wheel = build_wheel(tmp_path, compile_anew=True, CC="false", CXX="false")
    assert names_in(wheel) == {name for name in files if not name.endswith(".so")}
    target = tmp_path / "installed"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel)
    described = run("-c", DESCRIBE_OPS, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)})
    assert "linear: reference (" in described
    assert "native_portable: not built: install quire again where a C++17 compiler" in described


def test_the_demo_models_are_in_the_wheel_whole(files):
    demo = {name for name in expected("*") if name.startswith("quire/models/demo/")}
    assert {f"quire/models/demo/{name}/model.safetensors" for name in ("target", "draft", "eagle")} <= demo
    assert sorted(demo - files) == []


def test_nothing_is_installed_beside_the_one_import_name(files):
    tops = {name.split("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"quire"}
    # A quire/__init__.py would keep other distributions, and an editable install, from sharing the name.
    assert "quire/__init__.py" not in files


def test_the_licence_and_the_command_are_in_the_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split("/", 1)[1]: name for name in archive.namelist() if ".dist-info/" in name}
        commands = ConfigParser()
        commands.read_string(archive.read(names["entry_points.txt"]).decode())
    assert "licenses/LICENSE" in names
    assert dict(commands["console_scripts"]) == {"quire": "quire.server.cli:main"}


def test_an_installed_wheel_works_away_from_the_checkout(wheel, tmp_path):
    target = tmp_path / "installed"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    origins = run("-c", IMPORT_ALL, cwd=tmp_path, env=environment).split()
    assert len(origins) >= len(PACKAGES)
    assert [origin for origin in origins if not Path(origin).is_relative_to(target)] == []
