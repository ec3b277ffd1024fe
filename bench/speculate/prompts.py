"""The prompts: text that goes on as it began, and text that may go on anyhow. Both are short, so that decoding is what is measured.

There are as many different ones of a kind as a batch may want: each is a form with numbers or words of its own in it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from quire.engine.tokenizer import Tokenizer
from quire.kernels.errors import InvalidConfigError

STRUCTURED, OPEN_ENDED = "structured", "open-ended"


def _json_records(n: int) -> str:
    names = ("alpha", "beta", "gamma", "delta", "epsilon")
    lines = [f'    {{"id": {n + i}, "name": "{names[(n + i) % 5]}", "size": {8 << i}}},' for i in range(4)]
    return "[\n" + "\n".join(lines) + "\n"


def _assertions(n: int) -> str:
    lines = [f"        self.assertEqual(f({n + i}), {n + i})" for i in range(4)]
    return "    def test_values(self):\n" + "\n".join(lines) + "\n"


def _refusals(n: int) -> str:
    return "".join(f"        self.assertRaises(TypeError, f, {n + i})\n" for i in range(5))


def _dispatch(n: int) -> str:
    lines = [f"    if name == 'key{n + i}':\n        return self.value{n + i}" for i in range(3)]
    return "def get(self, name):\n" + "\n".join(lines) + "\n"


def _attributes(n: int) -> str:
    names = ("name", "path", "mode", "size", "owner", "group")
    order = [f"{names[(n + i) % 6]}{n}" for i in range(5)]
    head = f"    def __init__(self, {', '.join(order)}):\n"
    return head + "".join(f"        self.{name} = {name}\n" for name in order[:3])


def _bullets(n: int) -> str:
    names = ("list", "dict", "tuple", "set", "str")
    return "The types are:\n\n" + "".join(
        f"* {names[(n + i) % 5]}: the type of {n + i} {names[(n + i) % 5]}s\n" for i in range(4)
    )


def _table(n: int) -> str:
    return "TABLE = (\n" + "".join(f"    (0x{n + i:x}0, 0x{n + i:x}f),\n" for i in range(5))


def _imports(n: int) -> str:
    names = ("os", "sys", "re", "io", "time", "json")
    return "".join(f"import {names[(n + i) % 6]}\n" for i in range(4)) + "".join(
        f"print({names[(n + i) % 6]}.path, {n})\n" for i in range(3)
    )


_FORMS: tuple[Callable[[int], str], ...] = (
    _json_records,
    _assertions,
    _refusals,
    _dispatch,
    _attributes,
    _bullets,
    _table,
    _imports,
)
_OPENERS = (
    'def read_{0}(path):\n    """Read the {0} at path.\n\n    ',
    "The {0} is used when a program has to ",
    "class {0}Error(Exception):\n    def ",
    "What happens if a {0} is closed while another thread ",
    "# This function walks over every {0} and\ndef ",
    "Changed in this version: the {0} now accepts ",
    "    def _find_{0}(self, request, ",
    "It is often useful to compare two {0}s, for instance ",
)
_SUBJECTS = ("message", "socket", "file", "table", "header", "queue", "token", "module")


def text_of(kind: str, idx: int) -> str:
    """The text of prompt `idx` of a kind."""
    if kind == STRUCTURED:
        return _FORMS[idx % len(_FORMS)](1 + idx // len(_FORMS))
    # Each opener meets each subject, so that the first 64 all differ.
    return _OPENERS[idx % len(_OPENERS)].format(_SUBJECTS[(idx + idx // len(_OPENERS)) % len(_SUBJECTS)])


def prompts_of(kind: str, count: int, tokenizer: Tokenizer | None) -> list[list[int]]:
    """Token ids of the first prompts of a kind. Raises InvalidConfigError where there is no tokenizer."""
    if tokenizer is None:
        raise InvalidConfigError(
            "prompts are text, and the model has no tokenizer; set tokenizer, or measure forced ones"
        )
    return [tokenizer.encode(text_of(kind, idx), add_special_tokens=True) for idx in range(count)]


def random_prompts(count: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """Prompts for a model that has no text: random token ids, always the same ones."""
    rng = np.random.default_rng(0)
    found: list[list[int]] = rng.integers(3, vocab_size, (count, num_tokens)).tolist()
    return found
