"""`quire`: the command line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from quire.bench.plan import command as plan
from quire.kernels.errors import QuireError
from quire.server import batch, bench, compile, environment, generate, remote, serve

EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. Errors that quire raises on purpose are printed without a traceback."""
    parser = argparse.ArgumentParser(
        prog="quire", description="LLM inference on JAX/XLA: TPU, Trainium/Inferentia, CPU."
    )
    parser.add_argument(
        "--verbose", action="store_true", help="log what is chosen, loaded and compiled, with the reasons"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (generate, serve, remote, batch, compile, plan, environment, bench):
        module.add_command(commands)
    namespace = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if namespace.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    run: Callable[[argparse.Namespace], int] = namespace.run
    try:
        return run(namespace)
    except QuireError as error:
        print(f"quire {namespace.command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has had enough, as `head` does; Python would complain again when it flushes at exit.
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
