import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.jaxserve.openai_server import Fake, serving
from tests.jaxserve.test_cli import INTERRUPTIBLE, MAIN, run


class Terminal:
    """`jaxserve chat` with a person before it."""

    def __init__(self, process: subprocess.Popen, keyboard: int):
        self.process, self._keyboard = process, keyboard

    def type(self, text: str) -> None:
        os.write(self._keyboard, text.encode())

    def until(self, text: str, seconds: float = 60) -> str:
        """What is shown up to this text."""
        shown, deadline = b"", time.monotonic() + seconds
        while text not in shown.decode(errors="replace"):
            assert select.select([self._keyboard], [], [], max(0, deadline - time.monotonic()))[0], shown
            shown += os.read(self._keyboard, 1)
        return shown.decode()


@contextmanager
def chatting(*arguments: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", INTERRUPTIBLE + MAIN + "main()", "chat", *arguments]
    environment = os.environ | {"TERM": "dumb", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        try:
            yield Terminal(process, ours)
        finally:
            process.kill()
            os.close(ours)


def test_ctrl_c_stops_an_answer_and_not_the_program(tmp_path):
    fake = Fake(delay=0.05)
    with serving(fake.app()) as url, chatting("--url", url, "--max-tokens", "1000") as terminal:
        terminal.until("fake at http://")
        terminal.until("/help lists commands, Ctrl-D ends")
        terminal.until("> ")
        terminal.type("hello\n")
        terminal.until("w1 ")
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("> ")
        terminal.type("/neu\n")
        assert "error: '/neu' is no command; there are /new" in terminal.until("> ")
        terminal.type("think\n")
        terminal.until("w0 w1 ")
        terminal.until("\r\n\r\nw2 w3 ")
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("> ")
        terminal.type("break\\\n")
        terminal.until("… ")
        terminal.type("it\n")
        assert "error: the server broke off its answer: a step failed" in terminal.until("> ")
        terminal.type(f"/save {tmp_path / 'said.json'}\n")
        terminal.until("4 messages are in")
        terminal.type("/exit\n")
        assert terminal.process.wait(30) == 0
    question, answer, _, other = json.loads((tmp_path / "said.json").read_text())
    assert question == {"role": "user", "content": "hello"}
    assert answer["content"].startswith("w0 w1 ") and len(answer["content"]) < 1000
    assert other["content"].startswith("w2 w3 ")  # without thoughts


def test_ctrl_c_stops_the_answer_of_a_model_in_this_process_and_the_next_one_comes():
    with chatting("--max-tokens", "2000", "--max-model-len", "2048", "--temperature", "0") as terminal:
        terminal.until("> ", seconds=200)
        for _ in range(2):
            terminal.type("def f(x):\n")
            terminal.until("\n    ", seconds=200)
            terminal.process.send_signal(signal.SIGINT)
            assert "(cut for want of tokens" not in terminal.until("> ")
            terminal.type("/new\n")
            terminal.until("started again")
            terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0


def test_from_a_pipe_messages_are_read_a_line_each_and_answers_alone_are_printed(tmp_path):
    fake, kept = Fake(), tmp_path / "said.json"
    kept.write_text(json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]))
    given = "--load", str(kept), "--system", "Be brief.", "--max-tokens", "2", "--seed", "1", "--stop", "!"
    with serving(fake.app()) as url:
        result = run("chat", "--url", url, *given, stdin="hello\n\nmore\\\nof it\n", OPENAI_API_KEY="secret")
    assert (result.returncode, result.stdout) == (0, "w0 w1 \nw0 w1 \n")
    first, second = fake.asked
    assert [message["content"] for message in first["messages"]] == ["Be brief.", "a", "b", "hello"]
    assert [message["content"] for message in second["messages"][3:]] == ["hello", "w0 w1 ", "more\nof it"]
    assert (first["seed"], first["stop"], first["model"], fake.keys) == (1, ["!"], "fake", {"Bearer secret"})


def test_a_model_in_this_process_answers_too():
    given = "chat", "--max-tokens", "4", "--max-model-len", "2048", "--temperature", "0"
    result = run(*given, stdin="def f(x):\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert result.stderr.endswith("(cut for want of tokens; raise --max-tokens or --max-model-len)\n")


def test_into_a_pipe_go_no_thoughts():
    with serving(Fake().app()) as url:
        result = run("chat", "--url", url, "--max-tokens", "4", stdin="think\n")
    assert (result.returncode, result.stdout) == (0, "w2 w3 \n")


def test_of_a_pipe_the_first_error_ends_it():
    with serving(Fake().app()) as url:
        result = run("chat", "--url", url, stdin="refuse\nhello\n")
    assert (result.returncode, result.stdout) == (2, "\n")
    assert result.stderr == f"error: {url}/v1/chat/completions answers 400: 'refuse' is refused\n"


def test_without_a_template_generate_is_named_before_a_model_is_loaded(tiny_folder):
    no_template = "has no chat template, so it can't chat; `jaxserve generate` has it continue a text"
    assert run("chat", "--model", str(tiny_folder)).stderr == f"error: {tiny_folder} {no_template}\n"
    with serving(Fake(chat=False).app()) as url:
        assert run("chat", "--url", url).stderr == f"error: fake at {url} {no_template}\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--url", "x", "--max-model-len", "9"), "--max-model-len is for a model in this process; leave it out"),
        (("--load", "nowhere"), "nowhere holds no messages (FileNotFoundError"),
        (("--temperature", "-1"), "temperature = -1.0: it must be"),
    ],
)
def test_what_can_not_be_is_told_in_one_line(given, message):
    result = run("chat", *given)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}") and len(result.stderr.splitlines()) == 1
