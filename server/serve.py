"""`quire serve`: the engine in its own process behind an HTTP server, from the first line of the log to the last request."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import uvicorn

from quire.engine.arguments import add_engine_flags, engine_arguments
from quire.engine.config import EngineConfig
from quire.engine.llm import load_tokenizer_of
from quire.engine.progress import show_progress
from quire.kernels.errors import InvalidConfigError, NotServingError
from quire.server.app import make_app
from quire.server.engine_client import EngineClient
from quire.server.engine_state import EngineState
from quire.server.http_protocol import STALL_SECONDS, HttpProtocol
from quire.server.metrics import ServerMetrics
from quire.server.settings import ServerSettings
from quire.server.state import ServerState
from quire.server.tracing import make_tracer

logger = logging.getLogger(__name__)

EXIT_ENGINE_DIED = 1
BACKLOG = 2048
# How long /health goes on telling of a dead engine before the server ends: long enough for a probe to see it.
LINGER_SECONDS = 1.0
# What responses have to reach their clients once their requests were ended.
FLUSH_SECONDS = 5


def add_command(commands: Any) -> None:
    """Adds the command and its flags."""
    parser = commands.add_parser(
        "serve",
        help="serve a model with OpenAI's API",
        description="Serve a model with OpenAI's API (and TGI's). /health, /ready and /metrics tell how it is; / shows it.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        default="demo",
        metavar="MODEL",
        help="Hugging Face id, folder, demo or demo-draft (default: demo)",
    )
    group = parser.add_argument_group("server settings")
    for option in fields(ServerSettings):
        kind = str(option.type)
        flag = "--" + option.name.replace("_", "-").replace("keys", "key").replace("origins", "origin")
        shown = "" if option.default in (None, (), "") else f" (default: {option.default})"
        common: dict[str, Any] = {
            "dest": option.name,
            "default": argparse.SUPPRESS,
            "help": f"{option.metadata['help']}{shown}",
        }
        if kind.startswith("tuple"):
            group.add_argument(flag, action="append", metavar="TEXT", **common)
        else:
            group.add_argument(flag, type=_type_of(kind), choices=option.metadata.get("choices"), **common)
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def _type_of(kind: str) -> type:
    for prefix, found in (("int", int), ("float", float), ("Path", Path)):
        if kind.startswith(prefix):
            return found
    return str


def run(namespace: argparse.Namespace) -> int:
    """Serves until it is told to stop (0) or the engine cannot go on (1; 2 when it never started)."""
    names = {option.name: str(option.type) for option in fields(ServerSettings)}
    given = {name: value for name, value in vars(namespace).items() if name in names}
    values: dict[str, Any] = {
        name: tuple(value) if names[name].startswith("tuple") else value for name, value in given.items()
    }
    settings = ServerSettings(**values)
    settings.check()
    if not namespace.verbose:
        logging.getLogger("quire").setLevel(logging.INFO if settings.access_log != "none" else logging.WARNING)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(Lifetime(settings, engine_arguments(namespace), verbose=namespace.verbose).run())


def loop_factory() -> Any:
    """Makes the event loops of servers and their clients: uvloop's loops where it exists."""
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would close its sockets at once, and a draining server still has to answer probes."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Lifetime:
    """Everything between start and exit of one server.

    `is_private` is a server that nobody else is to know of: it is not announced, and signals are left to its owner,
    who calls `stop`.
    """

    def __init__(
        self, settings: ServerSettings, arguments: dict[str, Any], *, verbose: bool, is_private: bool = False
    ) -> None:
        self._is_private = is_private
        self._settings = settings
        self._config = EngineConfig.from_arguments(**arguments)
        self._tracer = make_tracer(settings.otlp_endpoint)
        model_name = settings.served_model_name or self._config.model.model
        metrics = ServerMetrics(settings.metrics_prefix, model_name)
        engine = EngineClient(
            arguments,
            settings,
            load_tokenizer_of(self._config),
            metrics,
            record_trace=None if self._tracer is None else self._tracer.record,
            log_level="INFO" if verbose else "WARNING",
        )
        self._engine = engine
        template = settings.chat_template
        self._state = ServerState(
            settings, engine, metrics, model_name, None if template is None else _read_text(template, "chat_template")
        )
        self._server = _Server(self._uvicorn_config())
        self._stopped = asyncio.Event()

    async def run(self) -> int:
        """Serves; returns the exit status."""
        listener = _listen(self._settings)
        server = self._server
        loop = asyncio.get_running_loop()
        if not self._is_private:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
        await self._engine.start()
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="http")
        telling = asyncio.create_task(self._tell(_describe(listener, self._settings)), name="progress")
        try:
            status = await self._until_the_end(serving)
        finally:
            server.should_exit = True
            await serving
            telling.cancel()
            await self._engine.stop()
            if self._settings.uds is not None:
                self._settings.uds.unlink(missing_ok=True)
            if self._tracer is not None:
                await loop.run_in_executor(None, self._tracer.close)
        return status

    def _uvicorn_config(self) -> uvicorn.Config:
        settings = self._settings

        def text(path: Path | None) -> str | None:
            return None if path is None else str(path)

        return uvicorn.Config(
            make_app(self._state),
            lifespan="off",
            http=HttpProtocol,
            log_config=None,
            access_log=False,
            server_header=False,
            root_path=settings.root_path,
            ssl_certfile=text(settings.ssl_certfile),
            ssl_keyfile=text(settings.ssl_keyfile),
            ssl_ca_certs=text(settings.ssl_ca_certs),
            ssl_cert_reqs=2 if settings.ssl_ca_certs else 0,
            timeout_keep_alive=int(STALL_SECONDS),
            timeout_graceful_shutdown=FLUSH_SECONDS,
            backlog=BACKLOG,
        )

    def stop(self) -> None:
        """Drains, then ends; called once more, ends at once."""
        if self._stopped.is_set():
            self._engine.fail_all(NotServingError("the server was told to stop at once"))
            self._server.force_exit = True
        self._stopped.set()

    async def _until_the_end(self, serving: asyncio.Task[None]) -> int:
        waits = {asyncio.create_task(event.wait()) for event in (self._stopped, self._engine.ended)}
        await asyncio.wait({serving, *waits}, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._engine.ended.is_set():
            return await self._after_death()
        self._engine.is_draining = True
        await self._drain()
        return EXIT_ENGINE_DIED if self._engine.ended.is_set() else 0

    async def _after_death(self) -> int:
        if self._engine.info is None:  # it never got ready: nobody was served, and the reason is the user's to mend
            raise self._engine.failure or NotServingError("the engine ended before it was ready")
        await asyncio.sleep(LINGER_SECONDS)
        return EXIT_ENGINE_DIED

    async def _drain(self) -> None:
        """Lets open requests end, within the limit."""
        limit = self._settings.drain_timeout
        logger.info("draining: %d requests are open and have %g s", self._engine.num_open_requests, limit)
        deadline = asyncio.get_running_loop().time() + limit
        while self._engine.num_open_requests and not self._engine.ended.is_set():
            if asyncio.get_running_loop().time() >= deadline:
                logger.warning("%d requests did not end in %g s", self._engine.num_open_requests, limit)
                self._engine.fail_all(
                    NotServingError(
                        f"the server stopped, and the request had not ended {limit:g} s after it was told to"
                    )
                )
            await asyncio.sleep(0.02)

    async def _tell(self, where: str) -> None:
        """Shows how far start-up is, then that it is done."""
        if not self._is_private:
            print(f"quire serves {self._state.model_name} at {where}, once it is ready", file=sys.stderr, flush=True)
        with show_progress() as bar:
            shown = None
            while self._engine.state is EngineState.STARTING:
                progress = self._engine.progress
                now = (progress.phase, progress.done, progress.total, progress.what)
                if progress.total and now != shown:
                    bar(*now)
                    shown = now
                await asyncio.sleep(0.1)
        if self._engine.state is EngineState.READY and self._engine.info is not None:
            info = self._engine.info
            print(
                f"ready after {info.ready_seconds:.1f} s: {info.num_programs} programs, {info.num_kv_blocks} KV blocks of "
                f"{info.block_size} tokens, at most {info.max_num_seqs} requests at once, {info.dtype} on {info.platform}",
                file=sys.stderr,
                flush=True,
            )


def _read_text(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfigError(f"{name}: {path} cannot be read ({error})") from error


def _listen(settings: ServerSettings) -> socket.socket:
    """The listening socket. Raises InvalidConfigError where the address is taken or is none."""
    if settings.uds is not None:
        return _listen_on_path(settings.uds)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise InvalidConfigError(
            f"cannot listen on {settings.host} port {settings.port} ({error}); choose another with --host and --port"
        ) from error


def _listen_on_path(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and listener.connect_ex(str(path)) != 0:
            path.unlink()  # left behind by a server that was killed
        listener.close()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise InvalidConfigError(f"cannot listen on {path} ({error}); choose another path with --uds") from error
    return listener


def _describe(listener: socket.socket, settings: ServerSettings) -> str:
    if settings.uds is not None:
        return f"unix socket {settings.uds}"
    host, port = listener.getsockname()[:2]
    scheme = "http" if settings.ssl_certfile is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{settings.root_path}"
