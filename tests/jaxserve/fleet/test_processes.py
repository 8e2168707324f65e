"""A fleet of real processes, asked over HTTP."""

import json
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest

from jaxserve import LLM, SamplingParams
from tests.processes import START_UP, Process, process
from tests.waiting import SOON, eventually

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.slow]

SLOW = """
import time
from jaxserve.engine import Engine
from jaxserve.options import EngineConfig
EngineConfig.__init__.__kwdefaults__["warmup"] = False
step = Engine._step
Engine._rounds = lambda self: 1
Engine._step = lambda self: (time.sleep(0.02), step(self))[1]
"""
SMALL = "--max-model-len", "64", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"
ASKED = {"max_tokens": 40, "ignore_eos": True}
WAYS: list[dict[str, Any]] = [
    {"prompt": [5, 7], "temperature": 0},
    {"prompt": [3], "temperature": 1.0, "seed": 11},
    {"prompt": list(range(1, 20)), "temperature": 0.7, "seed": 12, "top_k": 9},
]


def metric(http: httpx2.Client, name: str) -> float:
    """A sample of the router's, 0 if there is none."""
    lines = http.get("/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"jaxserve:fleet_{name} ")), 0.0)


def members(http: httpx2.Client, role: str, state: str = "healthy") -> float:
    return metric(http, f'instances{{role="{role}",state="{state}"}}')


def stream(http: httpx2.Client, way: dict[str, Any], begun: list[int]) -> tuple[str, list[str | None]]:
    """The text of a stream, and how it ended; `begun` counts its pieces."""
    text, reasons = "", []
    with http.stream("POST", "/v1/completions", json=ASKED | way | {"stream": True}) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                text += choice["text"]
                reasons.append(choice["finish_reason"])
                begun[0] += 1
    return text, [reason for reason in reasons if reason]


def test_a_decode_process_that_is_killed_while_it_streams_changes_no_answer(tiny_folder):
    llm = LLM(tiny_folder, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64, warmup=False)
    given = [SamplingParams(**ASKED, **{key: way[key] for key in way if key != "prompt"}) for way in WAYS]
    expected = [result.outputs[0].text for result in llm.generate([way["prompt"] for way in WAYS], given)]
    with ExitStack() as stack:
        begin = lambda *words, plant="": stack.enter_context(  # noqa: E731
            process("serve", str(tiny_folder), *words, "--max-model-len", "64", plant=plant)
        )
        router = begin("--role", "router", "--port", "0", "--control-port", "0", "--no-log-requests")
        address = router.find(r"instances join at (\S+)")
        http = stack.enter_context(httpx2.Client(base_url=router.url(), timeout=SOON))
        assert http.get("/health").json() == {"status": "waiting"}
        prefill, one = (instance(begin, role, address) for role in ("prefill", "decode"))
        assert eventually(lambda: members(http, "prefill") == members(http, "decode") == 1, START_UP)
        assert http.get("/health").json() == {"status": "ready"}
        whole = http.post("/v1/completions", json=ASKED | WAYS[0]).json()
        assert whole["choices"][0]["text"] == expected[0] and whole["usage"]["completion_tokens"] == 40
        instance(begin, "decode", address)
        assert eventually(lambda: members(http, "decode") == 2, START_UP)
        begun = [0]
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(stream, http, WAYS[i % 3], begun) for i in range(6)]
            assert eventually(lambda: begun[0] > 20)
            one.process.kill()
            answers = [each.result() for each in asked]
        assert answers == [(expected[i % 3], ["length"]) for i in range(6)]
        assert members(http, "decode") == 1 and metric(http, 'instances_lost_total{why="gone"}') == 1
        assert metric(http, "retries_total") == metric(http, "recovery_seconds_count") > 0
        prefill.process.send_signal(signal.SIGTERM)
        assert prefill.status() == 0 and members(http, "prefill") == 0
        assert http.post("/v1/completions", json=ASKED | WAYS[1]).json()["choices"][0]["text"] == expected[1]
        router.process.send_signal(signal.SIGTERM)
        assert router.status() == 0


def instance(begin: Callable[..., Process], role: str, address: str) -> Process:
    return begin("--role", role, "--router", address, *SMALL[2:], plant=SLOW)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--role", "decode"), "--router HOST:PORT is missing"),
        (("--role", "decode", "--router", "8001"), "--router 8001: it must be host:port"),
        (("--role", "decode", "--router", "x:99999"), "--router x:99999: it must be host:port"),
        (("--role", "decode", "--router", "x:1", "--host", "0.0.0.0"), "--host 0.0.0.0: with --role decode it is"),
        (("--role", "router", "--router", "x:1"), "--router HOST:PORT is for --role prefill and --role decode"),
        (("--router", "x:1"), "--router HOST:PORT is for --role prefill and --role decode"),
    ],
)
def test_options_of_a_role_that_are_missing_or_have_no_effect_are_named(words, message):
    with process("serve", *words) as command:
        assert command.status() == 2
        assert message in command.lines[-1]


def test_a_fleet_has_a_secret():
    with process("serve", "--role", "router", JAXSERVE_FLEET_TOKEN="") as command:
        assert command.status() == 2
        assert "--fleet-token or JAXSERVE_FLEET_TOKEN is missing" in command.lines[-1]
