"""A real server for the tests: `quire serve` in a process of its own, one per session, and more where a test asks for its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

START_SECONDS = 240.0
SMALL = ("--max-num-seqs", "8", "--max-model-len", "512", "--dtype", "float32")
ADMIN_KEY = "admin-secret"


@dataclass
class Server:
    """A running server, and what tests ask of it."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""
    admin_key: str = ADMIN_KEY

    def get(self, path: str, timeout: float = 10.0, **headers: str) -> tuple[int, str]:
        """Status and body of a GET, whatever the status. Header names are given with underscores."""
        request = urllib.request.Request(self.url + path, headers=_headers(headers))
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def post(self, path: str, body: object, timeout: float = 120.0, **headers: str) -> tuple[int, dict]:
        """Status and JSON body of a POST, whatever the status. Header names are given with underscores."""
        request = urllib.request.Request(
            self.url + path,
            data=body if isinstance(body, bytes) else json.dumps(body).encode(),
            headers={"content-type": "application/json", **_headers(headers)},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, by its name with the labels that tell samples apart (model_name and engine left out)."""
        found = {}
        for line in self.get("/metrics")[1].splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = re.sub(r'(model_name|engine)="[^"]*",?', "", name).replace(",}", "}").removesuffix("{}")
                found[name] = float(value)
        return found

    def wait_idle(self, seconds: float = 60.0) -> None:
        """Waits until nothing runs or waits, and asserts that every block is free."""
        deadline = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            open_now = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]
            if open_now == 0 and metrics["vllm:kv_cache_usage_perc"] == 0:
                return
            assert time.monotonic() < deadline, (open_now, metrics["vllm:kv_cache_usage_perc"])
            time.sleep(0.05)

    def wait_ready(self) -> None:
        """Waits until /ready says 200; fails with the log when the server ends before."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"not ready in time:\n{self.log.read_text()}"
            if not self.url:
                found = re.search(r" at (https?://\S+),", self.log.read_text())
                self.url = found.group(1) if found else ""
            if self.url:
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    if self.get("/ready")[0] == 200:
                        return
            time.sleep(0.1)


def _headers(named: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in named.items()}


@contextlib.contextmanager
def launched(*flags: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """A server process that may not be ready yet, killed at the end if it still runs."""
    with tempfile.TemporaryDirectory(prefix="quire-server-") as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-P", "-m", "quire.server.cli", "serve", *flags]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=folder, stdout=output, stderr=output, env={**os.environ, **(env or {})}
            )
        try:
            yield Server(process, log)
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def start_server(*flags: str, env: dict[str, str] | None = None) -> Iterator[Server]:
    """A server of one's own on the bundled model, small and ready."""
    with launched("demo", "--port", "0", *SMALL, *flags, env=env) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The server that tests share; leave it idle."""
    with start_server("--admin-key", ADMIN_KEY) as started:
        yield started
