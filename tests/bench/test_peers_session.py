"""The process that an engine runs in: what is said to it and back, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from quire.bench.peers.engines import DRIVERS
from quire.bench.peers.session import PeerFailedError, Session

DRIVER = """
import os, subprocess, sys, time

class Engine:
    def __init__(self, settings):
        if settings.get("broken"):
            raise RuntimeError("no such model")
        self.about = {"version": "1", "runs": "made up", "processors": len(os.sched_getaffinity(0))}
        print("a library says hello")
        os.system("echo and so does a program")

    def generate(self, prompts, output_lens, record):
        if prompts == [[1]]:
            child = subprocess.Popen(["sleep", "600"])
            print("child", child.pid, file=sys.stderr, flush=True)
            time.sleep(600)
        if prompts == [[2]]:
            print("the last words", file=sys.stderr, flush=True)
            os.abort()
        record.start()
        for number in range(max(output_lens)):
            for idx, output_len in enumerate(output_lens):
                if number < output_len:
                    record(idx, [prompts[idx][0] + number])

def load(settings):
    return Engine(settings)
"""
LOAD = {"op": "load", "threads": 1}


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def session(tmp_path, log):
    (tmp_path / "driver.py").write_text(DRIVER)
    with Session([sys.executable, str(DRIVERS / "serve.py"), str(tmp_path / "driver.py")], log) as session:
        yield session


def generate(*prompts, output_lens=(3,)):
    return {"op": "generate", "prompts": [list(prompt) for prompt in prompts], "output_lens": list(output_lens)}


def is_running(pid: int) -> bool:
    """A process of another parent may stay a zombie for a while; that counts as ended."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def ends_soon(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def test_tokens_come_back_with_their_times_whatever_libraries_print(session):
    assert session.ask(LOAD, 30) == {"version": "1", "runs": "made up", "processors": 1}
    reply = session.ask(generate([7], [20, 21], output_lens=[3, 2]), 30)
    assert reply["token_ids"] == [[7, 8, 9], [20, 21]]
    assert [len(times) for times in reply["token_times"]] == [3, 2]
    assert all(0 <= a <= b for times in reply["token_times"] for a, b in pairwise(times))
    assert session.peak_memory() > 1 << 20


def test_an_error_is_told_and_the_process_goes_on(session):
    with pytest.raises(PeerFailedError, match="RuntimeError: no such model"):
        session.ask({**LOAD, "broken": True}, 30)
    with pytest.raises(PeerFailedError, match="unknown op"):
        session.ask({"op": "dance"}, 30)
    assert session.is_alive
    assert session.ask(LOAD, 30)["version"] == "1"


def test_a_process_that_dies_leaves_its_last_words(session):
    session.ask(LOAD, 30)
    with pytest.raises(PeerFailedError, match=r"ended with signal 6: .*the last words"):
        session.ask(generate([2]), 30)
    with pytest.raises(PeerFailedError, match="ended with signal 6"):
        session.ask(generate([3]), 30)


def test_a_process_that_hangs_is_killed_with_what_it_has_started(session, log):
    session.ask(LOAD, 30)
    with pytest.raises(PeerFailedError, match="within 1 s"):
        session.ask(generate([1]), 1)
    assert not session.is_alive
    (child,) = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("child")]
    assert ends_soon(child)


def test_an_interrupt_ends_the_process(tmp_path, log):
    (tmp_path / "driver.py").write_text(DRIVER)
    session = Session([sys.executable, str(DRIVERS / "serve.py"), str(tmp_path / "driver.py")], log)
    session.ask(LOAD, 30)
    with pytest.raises(KeyboardInterrupt), session:
        raise KeyboardInterrupt
    assert not session.is_alive


def test_what_cannot_be_started_is_said(log):
    with pytest.raises(PeerFailedError, match="/nonexistent/python cannot be started"):
        Session(["/nonexistent/python"], log)


def test_drivers_import_nothing_of_quire():
    for path in DRIVERS.glob("*.py"):
        assert path.name == "quire_engine.py" or "quire." not in path.read_text(), path.name


def test_the_process_ends_when_nobody_is_left_to_answer_whatever_it_is_doing(tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(DRIVERS / "serve.py"), str(tmp_path / "driver.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for message in (LOAD, generate([1])):
            process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()
        child = next(int(line.split()[1]) for line in process.stderr if line.startswith(b"child"))
        process.stdin.close()
        assert process.wait(30) == 0
    os.kill(child, signal.SIGKILL)
