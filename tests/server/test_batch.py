"""Laws of `quire batch`: every line of the input gets exactly one line of the output, whatever happened on the way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from quire.server.cli import main
from tests.server.conftest import SMALL

COMMAND = [sys.executable, "-P", "-m", "quire.server.cli", "batch"]


def line(custom_id, body=None, url="/v1/completions", **other):
    body = {"prompt": "def f(x):", "max_tokens": 4, "temperature": 0} if body is None else body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **other}


def write(path: Path, lines) -> Path:
    path.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in lines))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def batch(*arguments, timeout=120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=timeout)


def refuse(capsys, *arguments) -> str:
    """What the command says where it refuses, in this process: most of the time that it takes is for imports."""
    assert main(["batch", *map(str, arguments)]) == 2
    return capsys.readouterr().err


@contextlib.contextmanager
def running(*arguments):
    """The command in a process group of its own, with its standard error in a file; killed at the end."""
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def descendants(process_id: int) -> list[int]:
    children = subprocess.run(["pgrep", "-P", str(process_id)], capture_output=True, text=True).stdout.split()
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def is_alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_both_endpoints_answer_as_they_do_alone(server, tmp_path):
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_completion_tokens": 5, "temperature": 0}
    lines = [line("a"), line("b", chat, "/v1/chat/completions"), line("c", {"prompt": "x", "n": 2, "max_tokens": 3})]
    source, target = write(tmp_path / "in", lines), tmp_path / "out"
    done = batch(source, target, "--url", server.url)
    assert done.returncode == 0, done.stderr
    found = {answer["custom_id"]: answer for answer in read(target)}
    assert set(found) == {"a", "b", "c"}
    for given in lines[:2]:
        response = found[given["custom_id"]]["response"]
        alone = server.post(given["url"], given["body"])[1]
        assert response["status_code"] == 200
        assert found[given["custom_id"]]["error"] is None
        assert response["body"]["usage"] == {
            **alone["usage"],
            "prompt_tokens_details": response["body"]["usage"]["prompt_tokens_details"],
        }
        mine, theirs = response["body"]["choices"][0], alone["choices"][0]
        assert mine == theirs
    assert len(found["c"]["response"]["body"]["choices"]) == 2


def test_a_line_that_is_refused_costs_no_other_one(server, tmp_path):
    lines = [line("good"), line("bad", {"prompt": "x", "temperature": -1}), line("long", {"prompt": [5] * 5000})]
    source, target = write(tmp_path / "in", lines), tmp_path / "out"
    done = batch(source, target, "--url", server.url)
    assert done.returncode == 1
    assert "2 failed" in done.stderr
    statuses = {answer["custom_id"]: answer["response"]["status_code"] for answer in read(target)}
    assert statuses == {"good": 200, "bad": 400, "long": 400}
    again = batch(source, target, "--url", server.url)
    assert again.returncode == 1
    assert "all 3 requests were answered before" in again.stderr
    assert len(read(target)) == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1"),
        ([line("a"), "", line("a")], "line 3: custom_id 'a'"),
        ([line("a", method="GET")], "line 1: method is 'GET'"),
        ([line("a", url="/v1/embeddings")], "line 1: url is '/v1/embeddings'"),
        ([line("a", {"prompt": "x", "stream": True})], "not streamed"),
        ([line("a", [1])], "line 1: body: Expected `object`"),
        ([line("a", surprise=1)], "surprise"),
        ([{"custom_id": "a"}], "missing required field `method`"),
        (["x"] * 9, "and 4 more"),
        ([line("\ud800")], "line 1"),
        (["[" * 100_000], "line 1"),
        ([""], "holds no request"),
    ],
)
def test_bad_input_runs_nothing(tmp_path, capsys, lines, message):
    source, target = write(tmp_path / "in", lines), tmp_path / "out"
    assert message in refuse(capsys, source, target, "--url", "http://127.0.0.1:9")
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense\n", "line 1 of"),
        ('{"custom_id": "other", "response": {"status_code": 200}}\n', "belongs to another batch"),
    ],
)
def test_output_of_something_else_is_left_alone(tmp_path, capsys, text, message):
    source, target = write(tmp_path / "in", [line("a")]), tmp_path / "out"
    target.write_text(text)
    assert message in refuse(capsys, source, target, "--url", "http://127.0.0.1:9")
    assert target.read_text() == text


def test_flags_that_would_do_nothing_are_refused(tmp_path, capsys):
    source, target = write(tmp_path / "in", [line("a")]), tmp_path / "out"
    for flags, name in [
        (("--url", "http://x", "--max-num-seqs", "4"), "max_num_seqs"),
        (("--url", "http://x", "--model", "demo"), "model"),
        (("--api-key", "x"), "api_key"),
        (("--concurrency", "0"), "concurrency"),
    ]:
        assert name in refuse(capsys, source, target, *flags)
    refuse(capsys, source, source)
    refuse(capsys, tmp_path / "absent", target)
    assert not target.exists()


def test_a_model_that_is_not_served_is_told_before_anything_runs(server, tmp_path):
    source, target = write(tmp_path / "in", [line("a", {"prompt": "x", "model": "gpt-9"})]), tmp_path / "out"
    done = batch(source, target, "--url", server.url)
    assert done.returncode == 2
    assert "gpt-9" in done.stderr
    assert read(target) == []


def test_nobody_there_ends_with_how_to_go_on(tmp_path):
    source, target = write(tmp_path / "in", [line("a")]), tmp_path / "out"
    done = batch(source, target, "--url", "http://127.0.0.1:9", "--retry-seconds", "0.5")
    assert done.returncode == 1
    assert "no server answers" in done.stderr
    assert "goes on" in done.stderr


def test_a_torn_last_line_is_written_anew(server, tmp_path):
    source, target = write(tmp_path / "in", [line("a"), line("b")]), tmp_path / "out"
    assert batch(source, target, "--url", server.url).returncode == 0
    whole = target.read_bytes()
    target.write_bytes(whole[:-20])
    assert batch(source, target, "--url", server.url).returncode == 0
    assert sorted(answer["custom_id"] for answer in read(target)) == ["a", "b"]


def test_one_output_has_one_writer(server, tmp_path):
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}
    source, target = write(tmp_path / "in", [line(str(idx), body) for idx in range(1000)]), tmp_path / "out"
    with running(source, target, "--url", server.url) as first:
        wait_for(target.exists)
        time.sleep(0.2)
        second = batch(source, target, "--url", server.url)
        assert second.returncode == 2
        assert "another quire batch" in second.stderr
        assert first.poll() is None
    server.wait_idle()


def test_killed_again_and_again_nothing_is_lost_or_doubled(server, tmp_path):
    # Few at a time and long ones: what is left at the last kill takes much longer than seeing that it is time for it.
    body = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    lines = [line(f"r{idx}", {"prompt": f"def f{idx}(", **body}) for idx in range(120)]
    source, target = write(tmp_path / "in", lines), tmp_path / "out"
    arguments = (source, target, "--url", server.url, "--concurrency", 4)
    for goal in (10, 45, 80):
        with running(*arguments) as process:
            wait_for(lambda goal=goal: num_lines(target) >= goal)
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert num_lines(target) < 120
    kept = target.read_bytes()[: target.read_bytes().rindex(b"\n") + 1]
    done = batch(*arguments)
    assert done.returncode == 0, done.stderr
    assert target.read_bytes().startswith(kept), "what was there is not touched"
    assert sorted(answer["custom_id"] for answer in read(target)) == sorted(given["custom_id"] for given in lines)
    server.wait_idle()


def test_an_interrupt_lets_open_requests_end(server, tmp_path):
    lines = [line(f"r{idx}", {"prompt": "x", "max_tokens": 60, "ignore_eos": True}) for idx in range(60)]
    source, target = write(tmp_path / "in", lines), tmp_path / "out"
    arguments = (source, target, "--url", server.url, "--concurrency", 4)
    with running(*arguments) as process:
        wait_for(lambda: num_lines(target) >= 4)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert b"goes on" in process.stderr.read()
    assert 4 <= num_lines(target) < 60
    assert batch(*arguments).returncode == 0
    assert len({answer["custom_id"] for answer in read(target)}) == num_lines(target) == 60


def test_its_own_server_dies_with_it_and_answers_the_rest(tmp_path):
    body = {"prompt": "x", "max_tokens": 40, "temperature": 0, "ignore_eos": True, "model": "mine"}
    source, target = write(tmp_path / "in", [line(str(idx), body) for idx in range(60)]), tmp_path / "out"
    # Two at a time: all of them at once are done before anybody could kill it.
    arguments = (source, target, "--served-model-name", "mine", "--concurrency", 2, *SMALL)
    with running(*arguments) as process:
        wait_for(lambda: num_lines(target) >= 5, 300)
        engines = descendants(process.pid)
        assert engines
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        wait_for(lambda: not any(map(is_alive, engines)), 20)
    assert num_lines(target) < 60
    done = batch(*arguments, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = read(target)
    assert len({answer["custom_id"] for answer in answers}) == len(answers) == 60
    assert len({answer["response"]["body"]["choices"][0]["text"] for answer in answers}) == 1, (
        "the same prompt, greedily"
    )


def test_when_its_engine_is_killed_it_ends_and_can_go_on(tmp_path):
    body = {"prompt": "x", "max_tokens": 100, "ignore_eos": True}
    source, target = write(tmp_path / "in", [line(str(idx), body) for idx in range(80)]), tmp_path / "out"
    with running(source, target, *SMALL) as process:
        wait_for(lambda: num_lines(target) >= 1, 300)
        for engine in descendants(process.pid):
            os.kill(engine, signal.SIGKILL)
        assert process.wait(timeout=60) == 1
        message = process.stderr.read().decode()
    assert "engine died" in message
    assert "goes on" in message
    assert all(answer["response"]["status_code"] == 200 for answer in read(target))


class Moody(BaseHTTPRequestHandler):
    """A server that refuses each request in several ways before it answers; what the real one does under load, in order."""

    moods = (429, 503, 500, 200)
    seen: dict[str, int]
    lock = threading.Lock()

    def do_GET(self):
        self.answer(404 if self.path == "/ready" else 200, {"data": [{"id": "m"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.lock:
            count = self.seen.get(body["prompt"], 0)
            self.seen[body["prompt"]] = count + 1
        self.answer(500 if body["prompt"] == "poison" else self.moods[count], {"echo": body["prompt"]})

    def answer(self, status, body):
        data = json.dumps(body, indent=1).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        if status in (429, 503):
            self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_what_may_pass_is_tried_again(tmp_path):
    Moody.seen = {}
    lines = [line(name, {"prompt": name}) for name in ("a", "b", "poison")]
    source, target = write(tmp_path / "in", lines), tmp_path / "out"
    with ThreadingHTTPServer(("127.0.0.1", 0), Moody) as peer:
        threading.Thread(target=peer.serve_forever, daemon=True).start()
        done = batch(source, target, "--url", f"http://127.0.0.1:{peer.server_port}")
        peer.shutdown()
    assert done.returncode == 1, done.stderr
    assert Moody.seen == {"a": 4, "b": 4, "poison": 3}
    found = {answer["custom_id"]: answer["response"] for answer in read(target)}
    assert {name: found[name]["status_code"] for name in found} == {"a": 200, "b": 200, "poison": 500}
    assert found["a"]["body"] == {"echo": "a"}
