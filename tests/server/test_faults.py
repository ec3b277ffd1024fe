"""What goes wrong in production: processes killed, signals under load, a full queue, readers that do not read."""

import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.server.conftest import SMALL, Server, launched, start_server

# A second or two: nothing that is to be interrupted may end before.
LONG = {"model": "demo", "prompt": "import os", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}
SHORT = {**LONG, "max_tokens": 8}


def roomy_server(*flags: str) -> AbstractContextManager[Server]:
    """One for texts as long as `LONG`."""
    return start_server("--max-model-len", "2048", *flags)


class Stream(threading.Thread):
    """Reads a streamed completion to its end, in a thread; keeps the text, the errors, and whether [DONE] came."""

    def __init__(self, server: Server, body: dict) -> None:
        super().__init__(daemon=True)
        self._request = urllib.request.Request(
            server.url + "/v1/completions",
            data=json.dumps({**body, "stream": True}).encode(),
            headers={"content-type": "application/json"},
        )
        self.text, self.error, self.is_done, self.status = "", None, False, None
        self.has_begun = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            with urllib.request.urlopen(self._request, timeout=120) as response:
                self.status = response.status
                for line in response:
                    self._take(line.decode().removeprefix("data: ").strip())
        except urllib.error.HTTPError as error:
            with error:
                self.status, self.error = error.code, json.loads(error.read())["error"]
        self.has_begun.set()

    def _take(self, data: str) -> None:
        if data == "[DONE]":
            self.is_done = True
        elif data:
            chunk = json.loads(data)
            self.error = chunk.get("error", self.error)
            if chunk.get("choices"):
                self.text += chunk["choices"][0]["text"]
                self.has_begun.set()

    def finish(self) -> "Stream":
        """Waits for the end."""
        self.join(timeout=60)
        assert not self.is_alive(), "the stream hangs"
        return self


def engine_pid(server: Server) -> int:
    """The server's only child."""
    (pid,) = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return int(pid)


def wait_gone(pid: int, seconds: float = 10.0) -> None:
    """Waits until a process has ended; a zombie has."""
    deadline = time.monotonic() + seconds
    while os.path.exists(f"/proc/{pid}") and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.02)


def change_scheduler(server: Server, **changes: object) -> dict:
    """Changes scheduler settings through the admin endpoint."""
    status, answer = server.post("/admin/scheduler", changes, Authorization=f"Bearer {server.admin_key}")
    assert status == 200, answer
    return answer


def test_killed_engine_ends_streams_with_an_error_and_is_started_again_when_asked_to() -> None:
    with roomy_server("--engine-restarts", "1") as server:
        _, before = server.post("/v1/completions", SHORT)
        streams = [Stream(server, LONG) for _ in range(3)]
        for stream in streams:
            assert stream.has_begun.wait(30)
        begin = time.monotonic()
        os.kill(engine_pid(server), signal.SIGKILL)
        for stream in streams:
            assert "engine died" in stream.finish().error["message"]
            assert stream.is_done
        assert time.monotonic() - begin < 5
        assert server.get("/ready")[0] == 503
        server.wait_ready()
        _, after = server.post("/v1/completions", SHORT)
        assert after["choices"][0]["text"] == before["choices"][0]["text"]
        server.wait_idle()

        pid = engine_pid(server)
        stream = Stream(server, LONG)
        assert stream.has_begun.wait(30)
        os.kill(pid, signal.SIGKILL)
        stream.finish()
        deadline = time.monotonic() + 5
        while server.get("/health")[0] != 503:
            assert time.monotonic() < deadline
        status, answer = server.post("/v1/completions", SHORT)
        assert status == 503
        assert "dead" in answer["error"]["message"]
        assert server.process.wait(timeout=20) == 1
        wait_gone(pid)


def test_drain_ends_what_is_open_and_takes_nothing_new() -> None:
    with roomy_server() as server:
        pid = engine_pid(server)
        streams = [Stream(server, LONG) for _ in range(4)]
        for stream in streams:
            assert stream.has_begun.wait(30)
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while server.get("/ready")[0] == 200:
            assert time.monotonic() < deadline
        assert json.loads(server.get("/ready")[1])["status"] == "draining"
        assert server.get("/health")[0] == 200
        status, answer = server.post("/v1/completions", SHORT)
        assert status == 503
        assert "stop" in answer["error"]["message"]
        texts = [stream.finish().text for stream in streams]
        assert all(stream.is_done and stream.error is None for stream in streams)
        assert len(set(texts)) == 1
        assert server.process.wait(timeout=20) == 0
        wait_gone(pid)


def test_drain_has_a_limit_after_which_requests_end_with_an_error() -> None:
    with roomy_server("--drain-timeout", "0.1") as server:
        pid = engine_pid(server)
        streams = [Stream(server, LONG) for _ in range(8)]
        for stream in streams:
            assert stream.has_begun.wait(30)
        server.process.send_signal(signal.SIGTERM)
        errors = [stream.finish().error for stream in streams]
        assert all(error is not None and "stopped" in error["message"] for error in errors), errors
        assert server.process.wait(timeout=20) == 0
        wait_gone(pid)


def test_engine_goes_when_the_server_is_killed() -> None:
    with roomy_server() as server:
        pid = engine_pid(server)
        stream = Stream(server, LONG)
        assert stream.has_begun.wait(30)
        server.process.kill()
        server.process.wait()
        wait_gone(pid)


def test_server_killed_while_it_starts_leaves_no_engine() -> None:
    with launched("demo", "--port", "0", *SMALL) as server:
        deadline = time.monotonic() + 60
        while not Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        pid = engine_pid(server)
        server.process.kill()
        server.process.wait()
        wait_gone(pid)


def test_full_queue_is_answered_429_with_the_time_to_wait(server: Server) -> None:
    before = change_scheduler(server)["settings"]
    change_scheduler(server, max_num_seqs=1, max_queued_requests=2)
    try:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda _: _status_and_wait(server), range(12)))
    finally:
        change_scheduler(server, max_num_seqs=before["max_num_seqs"], max_queued_requests=before["max_queued_requests"])
    refused = [wait for status, wait in answers if status == 429]
    assert refused
    assert all(1 <= int(wait) <= 60 for wait in refused)
    assert {status for status, _ in answers} == {200, 429}
    server.wait_idle()
    assert server.post("/v1/completions", SHORT)[0] == 200


def _status_and_wait(server: Server, prompt: str | list[int] = "import os") -> tuple[int, str | None]:
    request = urllib.request.Request(
        server.url + "/v1/completions",
        data=json.dumps({**LONG, "prompt": prompt, "max_tokens": 60}).encode(),
        headers={"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, None
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Retry-After"]


def test_queue_is_limited_by_tokens_too(server: Server) -> None:
    limit = change_scheduler(server)["settings"]["max_queued_tokens"]
    change_scheduler(server, max_queued_tokens=10)
    try:
        status, answer = server.post("/v1/completions", {**SHORT, "prompt": list(range(5, 30))})
        assert status == 400
        assert "queue" in answer["error"]["message"]
        assert server.post("/v1/completions", {**SHORT, "prompt": list(range(5, 15))})[0] == 200
    finally:
        change_scheduler(server, max_queued_tokens=limit)


def test_queue_full_of_tokens_is_answered_429(server: Server) -> None:
    before = change_scheduler(server)["settings"]
    change_scheduler(server, max_num_seqs=1, max_queued_tokens=30)
    prompts = [list(range(5 + number, 25 + number)) for number in range(8)]
    try:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda prompt: _status_and_wait(server, prompt), prompts))
    finally:
        change_scheduler(server, max_num_seqs=before["max_num_seqs"], max_queued_tokens=before["max_queued_tokens"])
    assert {status for status, _ in answers} == {200, 429}
    assert all(1 <= int(wait) <= 60 for status, wait in answers if status == 429)
    server.wait_idle()


def test_client_that_waits_for_a_whole_answer_and_goes_away_frees_its_blocks(server: Server) -> None:
    before = server.metrics()
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "n": 8, "temperature": 1.0}).encode()
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        deadline = time.monotonic() + 30
        while server.metrics()["vllm:num_requests_running"] == 0:
            assert time.monotonic() < deadline
    server.wait_idle()
    after = server.metrics()
    name = 'vllm:request_success_total{finished_reason="abort"}'
    assert after[name] == before[name] + 1
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] < 8 * LONG["max_tokens"]


def test_slow_reader_holds_up_nobody_and_loses_nothing(server: Server) -> None:
    expected = Stream(server, LONG).finish().text
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "stream": True}).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        slow.sendall(f"{head}\r\nconnection: close\r\n\r\n".encode() + body)
        for _ in range(3):
            assert server.post("/v1/completions", SHORT)[0] == 200
        server.wait_idle()  # the engine has long finished; only the reader has not
        slow.settimeout(30)
        received = b"".join(iter(lambda: slow.recv(65536), b""))
    assert _text_of_events(received) == expected


def _text_of_events(raw: bytes) -> str:
    """The completion's text from an HTTP response of chunked events."""
    events = [line[6:] for line in raw.split(b"\n") if line.startswith(b"data: {")]
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


def test_request_that_takes_too_long_ends_with_an_error() -> None:
    with roomy_server("--request-timeout", "0.3") as server:
        status, answer = server.post("/v1/completions", {**LONG, "n": 8, "temperature": 1.0})
        assert status == 504
        assert "0.3 seconds" in answer["error"]["message"]
        server.wait_idle()
        assert server.post("/v1/completions", {**SHORT, "max_tokens": 1})[0] == 200


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["/nonexistent/folder"], "/nonexistent/folder"),
        (["demo", "--max-model-len", "99999"], "lower it to"),
        (["demo", "--ssl-certfile", "/nonexistent"], "ssl_keyfile"),
        (["demo", "--host", "203.0.113.1"], "cannot listen"),
        (["demo", "--api-key-file", "/nonexistent"], "/nonexistent"),
    ],
)
def test_server_that_cannot_start_says_why_in_a_line_and_leaves_nothing(flags: list[str], part: str) -> None:
    with launched(*flags, "--port", "0") as server:
        assert server.process.wait(timeout=120) == 2
        log = server.log.read_text()
        assert part in log
        assert "Traceback" not in log


def test_unix_socket_is_served_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "quire.sock"
    with launched("demo", "--uds", str(path), *SMALL) as server:
        deadline = time.monotonic() + 240
        while not _answer_over(path, "/ready").startswith(b"HTTP/1.1 200"):
            assert server.process.poll() is None, server.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=20) == 0
    assert not path.exists()


def _answer_over(path: Path, target: str) -> bytes:
    """The raw answer to a GET over a unix socket; empty while nobody listens."""
    with socket.socket(socket.AF_UNIX) as connection:
        if not path.exists() or connection.connect_ex(str(path)) != 0:
            return b""
        connection.sendall(f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))
