import json
import re
import signal
import subprocess
import sys

import pytest

from tests.jaxserve.openai_server import Fake, serving
from tests.jaxserve.test_cli import INTERRUPTIBLE, MAIN, run
from tests.waiting import SOON, eventually


def test_a_load_ends_with_tables_and_keeps_all_numbers_and_a_picture(tmp_path):
    fake, out, plot = Fake(), tmp_path / "load.json", tmp_path / "load.svg"
    with serving(fake.app()) as url:
        result = run(
            *("bench", "serve", "--url", url, "--requests", "6", "--concurrency", "2", "--warmup", "1"),
            *("--prompt-tokens", "8", "--prefix-tokens", "4", "--output-tokens", "3-5", "--goodput", "e2e:60000"),
            *("--out", str(out), "--plot", str(plot)),
            OPENAI_API_KEY="secret",
        )
    assert result.returncode == 0, result.stderr
    title, head, *rows = result.stdout.splitlines()
    assert title == f"fake at {url}, 2 at a time"
    assert head.split() == ["ms", "mean", "p50", "p90", "p99"]
    assert [row.split("  ")[1] for row in rows[:4]] == [
        "time to first token",
        "between chunks",
        "per token after the first",
        "whole answer",
    ]
    for name, count in {"requests answered": "6", "that meet the goals": "6", "prompt tokens": "72"}.items():
        assert next(row.split()[-2] for row in rows if name in row) == count
    kept = json.loads(out.read_text())
    assert (kept["summary"]["answered"], len(kept["requests"]), kept["server"]) == (6, 6, "1.2.3")
    assert (kept["options"]["output_tokens"], "api_key" in kept["options"]) == ("3-5", False)
    assert plot.read_text().startswith("<?xml")
    prompts = [body["prompt"] for body in fake.asked]
    assert (len(prompts), len({tuple(prompt[:4]) for prompt in prompts[1:]})) == (7, 1)
    assert all(body["ignore_eos"] and body["model"] == "fake" and body["temperature"] == 0 for body in fake.asked)
    assert fake.keys == {"Bearer secret"}


def test_a_trace_is_put_as_chat_when_its_requests_are_due(tmp_path):
    (tmp_path / "trace").write_text('{"prompt": "hello", "output_tokens": 2, "arrival": 0.1}\n' * 2)
    fake = Fake()
    given = "--trace", str(tmp_path / "trace"), "--endpoint", "chat", "--warmup", "0", "--no-ignore-eos"
    with serving(fake.app()) as url:
        result = run("bench", "serve", "--url", f"{url}/v1/", "--model", "mine", *given)
    assert result.stdout.splitlines()[0] == f"mine at {url}, as the trace says"
    body = {"model": "mine", "temperature": 0.0, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    assert fake.asked == [body | {"stream": True, "stream_options": {"include_usage": True}}] * 2


def test_failures_are_counted_by_kind_and_told_once_each(tmp_path):
    (tmp_path / "trace").write_text('{"prompt": "refuse", "output_tokens": 2}\n' * 2)
    with serving(Fake().app()) as url:
        result = run("bench", "serve", "--url", url, "--trace", str(tmp_path / "trace"), "--warmup", "0")
    assert result.returncode == 0
    assert "failed: HTTP 400" in result.stdout
    assert result.stderr == f"HTTP 400: {url}/v1/completions answers 400: 'refuse' is refused\n"


def test_ctrl_c_ends_a_load_early_and_shows_what_there_is():
    fake = Fake(delay=0.02)
    with serving(fake.app()) as url:
        given = "bench", "serve", "--url", url, "--rate", "20", "--requests", "1000", "--output-tokens", "4"
        command = [sys.executable, "-c", INTERRUPTIBLE + MAIN + "main()", *given]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert eventually(lambda: len(fake.asked) - fake.open >= 20)
            process.send_signal(signal.SIGINT)
            shown, said = process.communicate(timeout=SOON)
    assert (process.returncode, said) == (0, "")
    answered, unfinished = (re.search(rf"{name} +([0-9]+)", shown) for name in ("requests answered", "not finished"))
    assert answered and unfinished and int(answered[1]) + int(unfinished[1]) == 1000
    assert 10 <= int(answered[1]) < 500


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--rate", "0"), "--rate 0.0: it must be above 0; inf is all at once"),
        (("--prompt-tokens", "few"), "'few' is no number of tokens"),
        (("--trace", "Makefile", "--prefix-tokens", "3"), "--trace says how long prompts and answers are"),
        (("--trace", "Makefile"), "Makefile:1 is not JSON"),
        (("--goodput", "fast"), "--goodput fast: it must be one of ttft, itl, tpot, e2e and milliseconds"),
        (("--plot", "load.txt"), "--plot load.txt: it must end in .png or .svg"),
        (("--out", "nowhere/load.json"), "--out nowhere/load.json: it must be a file"),
        (("--url", "http://127.0.0.1:1"), "no server at http://127.0.0.1:1"),
    ],
)
def test_what_can_not_be_is_told_in_one_line_before_anything_is_asked(given, message):
    result = run("bench", "serve", *given)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}") and len(result.stderr.splitlines()) == 1
