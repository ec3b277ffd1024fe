"""What the documents name exists: files, commands of the Makefile, and whatever of quire their Python imports."""

import ast
import importlib
import re
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "backends", "kernels", "models", "server", "bench")
FOLDERS = (*PACKAGES, "tests", ".ci")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(path for folder in (*FOLDERS, "docs") for path in (ROOT / folder).rglob("*.md"))]
)

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^(?: {4}[^\n]*)?\n)+", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)")
INLINE_CODE = re.compile(r"`([^`\n]+)`")
MAKE_COMMAND = re.compile(r"^(?:\$ )?make ([a-z]\w*)")
TARGET = re.compile(r"^([a-z]\w*):", re.MULTILINE)


def blocks_of(text: str) -> list[str]:
    """The code blocks of a document, fenced or indented, without their indent."""
    fenced = [code for _, code in FENCE.findall(text)]
    indented = [dedent(code) for code in INDENTED.findall(FENCE.sub("", text))]
    return [code for code in (*fenced, *indented) if code.strip()]


def inline_code(text: str) -> list[str]:
    """What stands in backticks outside the blocks."""
    return INLINE_CODE.findall(FENCE.sub("", text))


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links that lead nowhere."""
    targets = [link.split("#")[0] for link in LINK.findall(FENCE.sub("", text)) if not re.match(r"\w+:", link)]
    return [target for target in targets if target and not (folder / target).exists()]


def missing_files(text: str) -> list[str]:
    """Paths in backticks that are not there: those that begin with a folder of the repository, and bare names of modules."""
    paths = [code for code in inline_code(text) if re.fullmatch(r"[\w./-]+", code)]
    within = [path for path in paths if "/" in path and path.split("/")[0] in FOLDERS]
    modules = [path for path in paths if "/" not in path and path.endswith(".py")]
    known = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    return [path for path in within if not (ROOT / path).exists()] + [name for name in modules if name not in known]


def unknown_targets(text: str, makefile: str) -> list[str]:
    """Targets of `make` that are told to be run, in a block or in backticks, and that the Makefile lacks."""
    lines = [line.strip() for block in blocks_of(text) for line in block.splitlines()] + inline_code(text)
    named = [found[1] for line in lines if (found := MAKE_COMMAND.match(line))]
    return [name for name in named if name not in TARGET.findall(makefile)]


def unknown_imports(text: str) -> list[str]:
    """Names that the Python blocks import from quire and that it does not have. A block that is no Python raises SyntaxError."""
    blocks = [block for block in blocks_of(text) if re.search("^from quire", block, re.MULTILINE)]
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    return [
        f"{node.module}.{alias.name}"
        for node in nodes
        if node.module is not None and node.module.split(".")[0] == "quire"
        for alias in node.names
        if not hasattr(importlib.import_module(node.module), alias.name)
    ]


def test_there_is_a_readme():
    assert ROOT / "README.md" in DOCUMENTS


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_whatever_a_document_names_exists(path):
    text = path.read_text(encoding="utf-8")
    assert broken_links(text, path.parent) == []
    assert missing_files(text) == []
    assert unknown_targets(text, (ROOT / "Makefile").read_text()) == []
    assert unknown_imports(text) == []


def test_what_does_not_exist_is_noticed():
    assert broken_links("[a](gone.md#part) [b](README.md) [c](https://example.org)", ROOT) == ["gone.md"]
    assert missing_files("`engine/gone.py`, `engine/`, `a/b`, `engine/*.py`, `lost.py`") == [
        "engine/gone.py",
        "lost.py",
    ]
    text = "`make gone`\n```sh\n$ make test\nmake lost\n```\ntext:\n\n    make astray   # why\n\nmore\n"
    assert unknown_targets(text, "test: check\n") == ["lost", "astray", "gone"]


@pytest.mark.parametrize("form", ["```python\n{}\n```\n", "text:\n\n    {}\n\nmore\n"])
def test_an_import_that_would_fail_is_noticed(form):
    assert unknown_imports(form.format("from quire.engine import LLM, Gone")) == ["quire.engine.Gone"]
    with pytest.raises(SyntaxError):
        unknown_imports(form.format("from quire.engine import"))
