"""Command-line flags made from the engine's settings: one flag per field, spelled with dashes."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

from quire.engine.config import option_fields


def add_engine_flags(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Adds a flag for every setting but the model and the flags `without`; what is not given keeps its default."""
    group = parser.add_argument_group("engine settings")
    for option in option_fields():
        if option.name == "model":
            continue
        flag = "--" + option.name.replace("_", "-")
        if flag in without:
            continue
        default = "" if option.default is None else f" (default: {option.default})"
        common: dict[str, Any] = {
            "dest": option.name,
            "default": argparse.SUPPRESS,
            "help": f"{option.metadata['help']}{default}",
        }
        annotation = str(option.type)
        if annotation.startswith("bool"):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        else:
            group.add_argument(flag, type=_parser_of(annotation), choices=option.metadata["choices"], **common)


def engine_arguments(namespace: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, ready for `LLM(**...)`."""
    names = {option.name for option in option_fields()}
    return {name: value for name, value in vars(namespace).items() if name in names}


def _parser_of(annotation: str) -> type:
    if annotation.startswith("int"):
        return int
    return float if annotation.startswith("float") else str
