"""Text that comes with Python itself, as weighted streams of documents, split into training and held-out by file.

Four streams: `library` (sources of the standard library), `tests` (sources of its test suite, if installed), `prose` (docstrings, the
language reference that `help()` shows, text files) and `chat` (question and answer pairs made from docstrings and short functions).
A file is held out by the hash of its path, and so is everything made from it.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType

STREAM_WEIGHTS = {"library": 0.60, "tests": 0.18, "prose": 0.14, "chat": 0.08}
"""Share of the training tokens drawn from each stream."""

_HELD_OUT_PER_MILLE = 20
_SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "encoded_modules", "bundled", "test_email/data",
    "lib2to3/tests/data", "lib-dynload",
}  # fmt: skip
_MODULES_IN_C = ["builtins", "math", "cmath", "itertools", "sys", "time", "array", "zlib", "select", "errno", "gc", "marshal",
                 "binascii", "unicodedata", "_collections", "_functools", "_struct", "_random", "_io", "_bisect", "_heapq", "atexit",
                 "posix", "_socket", "_thread", "mmap", "fcntl", "_csv", "_json", "_datetime", "_operator"]  # fmt: skip


@dataclass(frozen=True)
class Exchange:
    """One chat: an optional system message, a question and its answer."""

    question: str
    answer: str
    system: str | None = None


@dataclass
class Corpus:
    """Documents per stream; `chat` documents are kept apart since a template turns them into text."""

    documents: dict[str, list[str]] = field(
        default_factory=lambda: {name: [] for name in STREAM_WEIGHTS if name != "chat"}
    )
    exchanges: list[Exchange] = field(default_factory=list)


def is_held_out(name: str) -> bool:
    """True for about 2 % of the names, by their hash alone, so that the split never moves."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 1000 < _HELD_OUT_PER_MILLE


def build_corpus() -> tuple[Corpus, Corpus]:
    """Reads the running interpreter's standard library; returns (training, held-out), in a fixed order."""
    train, held_out = Corpus(), Corpus()
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        text = _read_source(path, name)
        if text is not None:
            _add_module(held_out if is_held_out(name) else train, name, text)
    for path in sorted([*root.rglob("*.txt"), *root.rglob("*.rst")]):
        name = path.relative_to(root).as_posix()
        text = _read_source(path, name)
        if text is not None and not name.startswith("test/") and _looks_like_words(text):
            (held_out if is_held_out(name) else train).documents["prose"].append(text)
    for name, text in sorted(_help_topics().items()):
        (held_out if is_held_out(f"topics/{name}") else train).documents["prose"].append(text)
    for module_name in _MODULES_IN_C:
        _add_compiled_module(held_out if is_held_out(module_name) else train, module_name)
    return train, held_out


def _read_source(path: Path, name: str) -> str | None:
    if any(f"/{folder}/" in f"/{name}" for folder in _SKIPPED_FOLDERS) or name.startswith("_sysconfigdata"):
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a few test files are written in other encodings on purpose
        return None
    usable = 40 <= len(text) <= 400_000 and _looks_like_words(text)
    return text.replace("\r\n", "\n").replace("\f", "").rstrip() + "\n" if usable else None


def _looks_like_words(text: str) -> bool:
    """False for tables of numbers and escapes."""
    return sum(map(str.isalpha, text)) > 0.4 * len(text)


def _help_topics() -> dict[str, str]:
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return topics


def _add_module(corpus: Corpus, name: str, text: str) -> None:
    is_test = (
        name.startswith(("test/", "idlelib/idle_test/", "lib2to3/tests/", "unittest/test/", "distutils/tests/"))
        or "/test/" in name
    )
    corpus.documents["tests" if is_test else "library"].append(text)
    if is_test:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes
            tree = ast.parse(text)
    except (SyntaxError, ValueError):  # a few files are wrong on purpose
        return
    module_name = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    entries = list(_described(tree, module_name))
    _add_reference(corpus, module_name, ast.get_docstring(tree), [(title, doc) for title, doc, _ in entries])
    for title, doc, node in entries:
        corpus.exchanges.extend(_exchanges(title, doc, _short_source(text, node)))


def _described(tree: ast.Module, module_name: str) -> Iterator[tuple[str, str, ast.AST]]:
    """(dotted name, docstring, node) of each public function, class and method."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{module_name}.{node.name}", ast.get_docstring(node) or "", node
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{module_name}.{node.name}.{inner.name}", ast.get_docstring(inner) or "", inner


def _short_source(text: str, node: ast.AST) -> str | None:
    if not isinstance(node, ast.FunctionDef) or node.end_lineno is None or node.col_offset != 0 or node.decorator_list:
        return None
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    return "\n".join(lines) if len(lines) <= 24 else None


def _add_reference(corpus: Corpus, module_name: str, module_doc: str | None, entries: list[tuple[str, str]]) -> None:
    """One prose document per module: its own docstring, then those of its members under their names."""
    parts = [module_doc] if module_doc else []
    parts += [f"{title}\n\n{doc}" for title, doc in entries if len(doc) > 60]
    if sum(map(len, parts)) > 300:
        corpus.documents["prose"].append(f"{module_name}\n\n" + "\n\n".join(parts) + "\n")


def _add_compiled_module(corpus: Corpus, module_name: str) -> None:
    try:
        module: ModuleType = import_module(module_name)
    except ImportError:  # not every platform has every one
        return
    public_name = module_name.lstrip("_")
    entries: list[tuple[str, str]] = []
    for member_name, member in sorted(vars(module).items()):
        doc = getattr(member, "__doc__", None)
        if member_name.startswith("_") or not callable(member) or not isinstance(doc, str):
            continue
        entries.append((f"{public_name}.{member_name}", doc))
        for method_name, method in sorted(vars(member).items()) if isinstance(member, type) else []:
            method_doc = getattr(method, "__doc__", None)
            if not method_name.startswith("_") and isinstance(method_doc, str):
                entries.append((f"{public_name}.{member_name}.{method_name}", method_doc))
    _add_reference(corpus, public_name, module.__doc__, entries)
    for title, doc in entries:
        corpus.exchanges.extend(_exchanges(title.removeprefix("builtins."), doc, None))


def _exchanges(title: str, doc: str, source: str | None) -> Iterator[Exchange]:
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", doc.strip()) if part.strip()]
    answer = next(
        (part for part in paragraphs if 25 <= len(part) <= 500 and " " in part and not part.endswith("--")), None
    )
    pick = int.from_bytes(hashlib.sha256(title.encode()).digest()[4:8], "big")
    system = "You answer questions about Python." if pick % 8 == 0 else None
    if answer is not None:
        forms = ["What does {} do?", "What is {}?", "Explain {}.", "How do I use {}?", "Tell me about {}."]
        yield Exchange(forms[pick % len(forms)].format(title), answer, system)
    if source is not None:
        name = title.rsplit(".", 1)[-1]
        forms = [
            "Write a function {}.",
            "Write a Python function called {}.",
            "Show me the source of {}.",
            "Implement {} in Python.",
        ]
        yield Exchange(forms[pick % len(forms)].format(name), f"```python\n{source}\n```", system)
