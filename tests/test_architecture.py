"""The rules of the house that a parser can see: which way imports run, how long files and functions are, who reads what.

Everything is read with `ast`; no module is imported. Each check gives the offenders as text, so that a failure names them.
"""

import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the lowest floor to the highest; a module imports from its own floor and from those before it.
FLOORS = ("kernels", "models", "backends", "engine", "bench", "server")

# The host's side of the engine: it decides, and must run in microseconds with no device in sight.
HOST_SIDE = (
    "admission",
    "block_pool",
    "detokenizer",
    "draft_controller",
    "draft_estimates",
    "kv_cache_manager",
    "outputs",
    "request",
    "sampling_params",
    "scheduler",
    "step_data",
    "tokenizer",
)
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "optax"}

MAX_FILE_LINES = 500
MAX_KERNEL_FILE_LINES = 900
MAX_MEDIAN_FUNCTION_LINES = 10
LONG_FUNCTION_LINES = 50
MAX_LONG_FUNCTION_SHARE = 0.05

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file under the name that it is installed by."""

    name: str
    path: str
    source: str
    is_package: bool = False

    @property
    def floor(self) -> str:
        return self.path.split("/")[0]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, self.path)

    @property
    def num_lines(self) -> int:
        return self.source.count("\n")


@cache
def modules() -> dict[str, Module]:
    """Every module of the packages by its installed name."""
    found = {}
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            relative = path.relative_to(ROOT)
            is_package = path.name == "__init__.py"
            parts = relative.parent.parts if is_package else relative.with_suffix("").parts
            name = ".".join(("quire", *parts))
            found[name] = Module(name, relative.as_posix(), path.read_text(encoding="utf-8"), is_package)
    return found


def from_imports(module: Module) -> Iterator[tuple[str, str]]:
    """Each `from base import name` anywhere in a module, a relative base made absolute."""
    package = module.name.split(".")[: None if module.is_package else -1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((base, alias.name) for alias in node.names)


def plain_imports(module: Module) -> set[str]:
    """What each `import name` anywhere in a module names."""
    nodes = [node for node in ast.walk(module.tree) if isinstance(node, ast.Import)]
    return {alias.name for node in nodes for alias in node.names}


def imported_names(module: Module) -> set[str]:
    """Dotted names that a module imports; for `from a import b` both `a` and `a.b`."""
    return plain_imports(module) | {name for a, b in from_imports(module) for name in (a, f"{a}.{b}")}


def quire_imports(module: Module, known: dict[str, Module]) -> set[str]:
    """Modules of `known` that a module imports.

    `from quire.a import b` is an import of `quire.a.b` alone where b is a module: whatever `quire/a/__init__.py` holds,
    it was not asked for.
    """
    taken = {f"{base}.{name}" if f"{base}.{name}" in known else base for base, name in from_imports(module)}
    return (plain_imports(module) | taken) & set(known) - {module.name}


def upward_imports(module: Module) -> list[str]:
    """Imports of a module that run against FLOORS."""
    allowed = FLOORS[: FLOORS.index(module.floor) + 1]
    floors = {name.split(".")[1] for name in imported_names(module) if name.startswith("quire.")}
    return [f"{module.path} imports quire.{floor}" for floor in sorted(floors) if floor not in allowed]


def closure(start: str, known: dict[str, Module]) -> set[str]:
    """A module and all that it imports of this project, directly or not."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting.extend(quire_imports(known[name], known))
    return reached


def device_imports(start: str, known: dict[str, Module]) -> list[str]:
    """Modules in the closure of `start` that import a device library."""
    return [
        f"{start} reaches {name}, which imports {library}"
        for name in sorted(closure(start, known))
        for library in sorted({imported.split(".")[0] for imported in imported_names(known[name])} & DEVICE_LIBRARIES)
    ]


def functions(module: Module) -> Iterator[tuple[str, int]]:
    """Each function's place and its lines, docstring included."""
    for node in ast.walk(module.tree):
        if isinstance(node, Function) and node.end_lineno is not None:
            yield f"{module.path}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def environment_reads(module: Module) -> list[str]:
    """Places that read or write the process's environment."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    places = []
    for node in ast.walk(module.tree):
        is_attribute = isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os"
        is_import = isinstance(node, ast.ImportFrom) and node.module == "os" and names & {a.name for a in node.names}
        if is_attribute or is_import:
            places.append(f"{module.path}:{node.lineno}")
    return places


def swallowed_errors(module: Module) -> list[str]:
    """Handlers of any exception at all that neither raise nor look at what they caught."""
    places = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler) and _catches_everything(node):
            inside = [inner for statement in node.body for inner in ast.walk(statement)]
            raises = any(isinstance(inner, ast.Raise) for inner in inside)
            records = node.name is not None and any(isinstance(i, ast.Name) and i.id == node.name for i in inside)
            logs = any(isinstance(inner, ast.Attribute) and inner.attr == "exception" for inner in inside)
            if not (raises or records or logs):
                places.append(f"{module.path}:{node.lineno}")
    return places


def _catches_everything(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(ast.unparse(name) in ("Exception", "BaseException") for name in caught)


def without_docstring(module: Module) -> list[str]:
    """Public functions and classes at a module's top level that say nothing about themselves."""
    return [
        f"{module.path}:{node.lineno} {node.name}"
        for node in module.tree.body
        if isinstance(node, Function | ast.ClassDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]


def everywhere(check) -> list[str]:
    """What a check of one module finds in all of them."""
    return [found for module in modules().values() for found in check(module)]


def module_of(source: str, name: str = "quire.models.sample") -> Module:
    """A module made up for a test of the checks."""
    return Module(name, "/".join(name.split(".")[1:]) + ".py", source)


# ---- the tree


def test_there_is_something_on_every_floor():
    assert {module.floor for module in modules().values()} == set(FLOORS)


def test_imports_run_downward_only():
    assert everywhere(upward_imports) == []


def test_no_module_is_imported_by_the_name_of_its_folder():
    wrong = [
        f"{module.path} imports {name}"
        for module in modules().values()
        for name in sorted(imported_names(module))
        if name.split(".")[0] in FLOORS
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: quire_imports(module, modules()) for name, module in modules().items()}
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize("name", HOST_SIDE)
def test_the_host_side_of_the_engine_never_reaches_jax(name):
    assert device_imports(f"quire.engine.{name}", modules()) == []


def test_files_stay_small():
    limits = {"kernels": MAX_KERNEL_FILE_LINES}
    too_long = [
        f"{module.path} has {module.num_lines} lines"
        for module in modules().values()
        if module.num_lines > limits.get(module.floor, MAX_FILE_LINES)
    ]
    assert too_long == []


def test_functions_stay_short():
    lengths = dict(found for module in modules().values() if module.floor != "kernels" for found in functions(module))
    long = {place: lines for place, lines in lengths.items() if lines > LONG_FUNCTION_LINES}
    assert statistics.median(lengths.values()) < MAX_MEDIAN_FUNCTION_LINES
    assert len(long) <= MAX_LONG_FUNCTION_SHARE * len(lengths), long


def test_the_environment_is_read_in_one_file():
    files = {place.rsplit(":", 1)[0] for place in everywhere(environment_reads)}
    assert files == {"backends/environment.py"}


def test_no_error_is_swallowed():
    assert everywhere(swallowed_errors) == []


def test_whatever_is_public_says_what_it_is():
    assert everywhere(without_docstring) == []


# ---- the checks themselves


@pytest.mark.parametrize(
    "source",
    [
        "import quire.engine.llm",
        "from quire import engine",
        "from ..engine import llm",
        "def f():\n    from quire.engine.core import EngineCore",
        "if TYPE_CHECKING:\n    from quire.backends.base import Backend",
    ],
)
def test_every_form_of_an_upward_import_is_seen(source):
    assert upward_imports(module_of(source))
    assert not upward_imports(module_of(source, "quire.server.sample"))


def test_a_device_library_is_seen_through_other_modules_but_not_through_a_parent_package():
    parts = (
        module_of("from quire.models.far import thing", "quire.engine.near"),
        module_of("from quire.models.pure import thing", "quire.engine.clean"),
        module_of("import jax.numpy as jnp", "quire.models.far"),
        module_of("thing = 1", "quire.models.pure"),
        Module("quire.models", "models/__init__.py", "import jax", is_package=True),
    )
    known = {module.name: module for module in parts}
    assert device_imports("quire.engine.near", known)
    assert not device_imports("quire.engine.clean", known)
    known["quire.engine.asks"] = module_of("from quire.models import thing", "quire.engine.asks")
    assert device_imports("quire.engine.asks", known)


@pytest.mark.parametrize("source", ["import os\nx = os.environ['A']", "from os import getenv"])
def test_every_form_of_reading_the_environment_is_seen(source):
    assert environment_reads(module_of(source))


@pytest.mark.parametrize(
    ("handler", "is_swallowed"),
    [
        ("except Exception:\n    pass", True),
        ("except (ValueError, BaseException):\n    pass", True),
        ("except:\n    pass", True),
        ("except Exception as error:\n    pass", True),
        ("except Exception as error:\n    found.append(error)", False),
        ("except Exception:\n    logger.exception('lost')", False),
        ("except Exception:\n    raise", False),
        ("except ValueError:\n    pass", False),
    ],
)
def test_a_swallowed_error_is_one_neither_raised_nor_recorded(handler, is_swallowed):
    assert bool(swallowed_errors(module_of(f"try:\n    f()\n{handler}"))) == is_swallowed
