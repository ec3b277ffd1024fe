"""Progress bars for loading and compiling, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from quire.engine.core import Progress

TITLES = {"load": "loading weights", "compile": "compiling steps"}


@contextmanager
def show_progress() -> Iterator[Progress]:
    """A progress function that draws one bar per phase on standard error; it draws nothing where that is no terminal."""
    bars: dict[str, tqdm[Any]] = {}

    def progress(phase: str, done: int, total: int, what: str) -> None:
        if phase not in bars:
            is_hidden = not sys.stderr.isatty()
            bars[phase] = tqdm(
                total=total, desc=TITLES.get(phase, phase), disable=is_hidden, leave=False, dynamic_ncols=True
            )
        bar = bars[phase]
        bar.set_postfix_str(what, refresh=False)
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()
