#!/usr/bin/env python3
"""Stands in for AWS's compiler: takes exactly the command line that its documentation has, and writes something in place of a NEFF.

$QUIRE_TEST_FAIL is "always", or "optimized" for a compiler that only manages with --optlevel=1. Every call is appended to
$QUIRE_TEST_CALLS as a line of JSON.
"""

import json
import os
import sys
from pathlib import Path

TARGETS = {"inf2", "trn1", "trn1n", "trn2", "trn3"}
FLAGS = {
    "--model-type": {"transformer"},
    "--auto-cast": {"none", "matmult", "all"},
    "--optlevel": {"1", "2", "3"},
    "--logical-nc-config": {"1", "2"},
}


def refuse(why: str) -> None:
    print(f"neuronx-cc: error: {why}", file=sys.stderr)
    sys.exit(2)


def main(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        print("NeuronX Compiler version 2.23.0 (stand-in)")
        return
    with Path(os.environ["QUIRE_TEST_CALLS"]).open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    if arguments[:1] != ["compile"] or len(arguments) < 8:
        refuse("usage: neuronx-cc compile FILE --framework XLA --target TARGET --output FILE")
    _, graph, *rest = arguments
    named = dict(zip(rest[0:6:2], rest[1:6:2], strict=True))
    if set(named) != {"--framework", "--target", "--output"} or named["--framework"] != "XLA":
        refuse(f"unexpected {named}")
    if named["--target"] not in TARGETS:
        refuse(f"unknown target {named['--target']}")
    flags = dict(flag.split("=", 1) if "=" in flag else (flag, "") for flag in rest[6:])
    for name, value in flags.items():
        if value not in FLAGS.get(name, set()):
            refuse(f"unrecognized argument {name}={value}")
    if flags.get("--logical-nc-config", "1") != "1" and named["--target"] in ("inf2", "trn1", "trn1n"):
        refuse("Unsupported Logical Neuron Core (LNC) configuration (NCC_EARG001)")
    program = Path(graph).read_bytes()
    if b"jit_" not in program[:64]:
        refuse(f"{graph} is no HloModuleProto")
    failing = os.environ.get("QUIRE_TEST_FAIL")
    if failing == "always" or (failing == "optimized" and flags.get("--optlevel") != "1"):
        refuse("[NCC_EBVF030] The number of instructions generated exceeds the limit.")
    Path(named["--output"]).write_bytes(b"NEFF" + named["--target"].encode() + b"\0" + program)


if __name__ == "__main__":
    main(sys.argv[1:])
