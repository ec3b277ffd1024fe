"""Kernel modules, with NKI bound to the emulator or to AWS's package."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from quire.kernels.nki import isa, language


def official_nki() -> tuple[ModuleType | None, str]:
    """AWS's package, or None and why not. What PyPI has under its name raises ImportError and says so."""
    try:
        return importlib.import_module("nki"), "installed"
    except ImportError as error:
        return None, f"AWS's nki is not installed: {error}"


@cache
def load_emulated(module: str) -> ModuleType:
    """The kernels of a module, their `import nki...` answered by the emulator.

    Raises FileNotFoundError when there is no source file of that name.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{module} has no source file")
    return run_emulated(Path(spec.origin).read_text(encoding="utf-8"), spec.origin)


def run_emulated(source: str, path: str) -> ModuleType:
    """A module of `source`, which `path` stands for in tracebacks and refusals, its `import nki...` answered by the emulator."""
    module = ModuleType(f"{Path(path).stem} on the emulator")
    module.__file__ = path
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def _emulated_package() -> ModuleType:
    package = ModuleType("nki")
    package.__dict__.update(language=language, isa=isa)
    return package


_NKI = _emulated_package()


def _import(name: str, *arguments: Any, **keywords: Any) -> Any:
    """`import nki.language as nl` asks for `nki` and takes its attribute."""
    return _NKI if name.partition(".")[0] == "nki" else builtins.__import__(name, *arguments, **keywords)
