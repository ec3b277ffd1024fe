"""`quire complete` and `quire chat` against a running server, also on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

QUIRE = [sys.executable, "-P", "-m", "quire.server.cli"]


def quire(*arguments, stdin="", env=None):
    return subprocess.run(
        [*QUIRE, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(env or {})},
    )


def completion(server, **body):
    return server.post("/v1/completions", {"temperature": 0, **body})[1]


def test_complete_prints_what_the_server_answers(server):
    done = quire("complete", "--url", server.url, "-p", "def add(a, b):", "--max-tokens", 12)
    text = completion(server, prompt="def add(a, b):", max_tokens=12)["choices"][0]["text"]
    assert (done.returncode, done.stdout, done.stderr) == (0, f"def add(a, b):{text}\n", "")
    assert quire("complete", "--url", server.url, "--max-tokens", 12, stdin="def add(a, b):").stdout == done.stdout


def test_complete_shows_several_prompts_and_choices_apart(server):
    flags = ("--max-tokens", 4, "--params", '{"n": 2, "seed": 3, "temperature": 1.0}')
    done = quire("complete", "--url", server.url, "-p", "one", "-p", "two", *flags)
    assert re.findall(r"^--- (.*)$", done.stdout, re.M) == ["1.1", "1.2", "2.1", "2.2"]
    answer = json.loads(quire("complete", "--url", server.url, "-p", "one", "-p", "two", "--json", *flags).stdout)
    shown = "".join(
        f"--- {1 + choice['index'] // 2}.{1 + choice['index'] % 2}\n{('one', 'two')[choice['index'] // 2]}{choice['text']}\n"
        for choice in answer["choices"]
    )
    assert done.stdout == shown


def test_chat_answers_one_message(server):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    body = {"messages": messages, "max_tokens": 9, "temperature": 0}
    expected = server.post("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
    flags = ("--url", server.url, "--system", "be brief", "--max-tokens", 9, "--temperature", 0)
    done = quire("chat", *flags, "-p", "hello")
    assert (done.returncode, done.stdout) == (0, expected + "\n")
    assert quire("chat", *flags, stdin="hello").stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("complete", "--params", "{"), 2, "--params is no JSON object"),
        (("complete", "--params", "[]"), 2, "--params is no JSON object"),
        (("complete", "--params", '{"stream": true}'), 2, "leave `stream` out"),
        (("complete", "--params", '{"surprise": 1}'), 2, "surprise"),
        (("complete", "--temperature", "-1"), 2, "temperature"),
        (("complete", "--model", "other"), 2, "no model 'other'"),
        (("chat", "--params", '{"n": 2}'), 2, "leave `n` out"),
    ],
)
def test_what_is_wrong_is_said(server, arguments, status, message):
    done = quire(*arguments, "--url", server.url, "-p", "x")
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_nobody_there_is_said():
    done = quire("complete", "--url", "http://127.0.0.1:9", "-p", "x")
    assert done.returncode == 2
    assert "no server answers at http://127.0.0.1:9" in done.stderr


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments):
        # Not pty.fork(): jax warns of every fork by Python code, and other tests of this process may have started it.
        self.file, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*QUIRE, *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def wait_for(self, wanted, seconds=60):
        """Reads until `wanted` has come; what came before and with it."""
        deadline = time.monotonic() + seconds
        while wanted not in self.text:
            assert self.reads(deadline), self.text
        before, _, self.text = self.text.partition(wanted)
        return before + wanted

    def reads(self, deadline):
        """Reads what comes next; False where nothing has come by `deadline`, or the command has ended."""
        if not select.select([self.file], [], [], max(deadline - time.monotonic(), 0))[0]:
            return False
        try:
            self.text += os.read(self.file, 4096).decode(errors="replace")
        except OSError:
            return False
        return True

    def type(self, text):
        os.write(self.file, text.encode())

    def end(self):
        """The exit status."""
        status = self.process.wait(timeout=30)
        os.close(self.file)
        return status


def test_a_conversation_remembers_and_forgets(server):
    chat = Terminal("chat", "--url", server.url, "--temperature", 0, "--max-tokens", 6)
    chat.wait_for("> ")
    chat.type("hello\n")
    first = chat.wait_for("> ").replace("\r", "").split("\n")[1]
    body = {"max_tokens": 6, "temperature": 0}
    messages = [{"role": "user", "content": "hello"}]

    def expected():
        return server.post("/v1/chat/completions", {"messages": messages, **body})[1]["choices"][0]["message"][
            "content"
        ]

    assert first == expected().split("\n")[0]
    messages += [{"role": "assistant", "content": expected()}, {"role": "user", "content": "more"}]
    before = server.metrics()["vllm:prompt_tokens_total"]
    chat.type("more\n")
    chat.wait_for("> ")
    longer = server.metrics()["vllm:prompt_tokens_total"] - before
    chat.type("/reset\n")
    chat.wait_for("forgotten")
    before = server.metrics()["vllm:prompt_tokens_total"]
    chat.type("more\n")
    chat.wait_for("> ")
    chat.wait_for("> ")
    assert server.metrics()["vllm:prompt_tokens_total"] - before < longer
    chat.type("/exit\n")
    assert chat.end() == 0


def test_an_answer_can_be_interrupted_and_the_conversation_goes_on(server):
    chat = Terminal("chat", "--url", server.url, "--params", '{"ignore_eos": true, "temperature": 0}')
    chat.wait_for("> ")
    chat.type("hello\n")
    chat.wait_for("hello")
    # The answer takes about half a second, so nothing must be asked for between its first word and the interrupt.
    deadline = time.monotonic() + 30
    while not chat.text.lstrip("\r\n"):
        assert chat.reads(deadline), chat.text
    chat.process.send_signal(signal.SIGINT)
    chat.wait_for("[ended]")
    chat.wait_for("> ")
    server.wait_idle()
    chat.type("\x04")
    assert chat.end() == 0
