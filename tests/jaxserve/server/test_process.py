"""`jaxserve serve` as its supervisor sees it: a process that starts, is told to end, hangs, or can't begin."""

import json
import re
import signal
import socket
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import httpx2
import pytest

from jaxserve.client import Client
from jaxserve.parallel.errors import ServerError
from tests.processes import Process, process
from tests.waiting import SOON, eventually

pytestmark = pytest.mark.xdist_group("server")

LONG = {"prompt": [5, 7], "max_tokens": 60, "temperature": 0, "ignore_eos": True}
SHORT = LONG | {"max_tokens": 2}
SMALL = "--max-model-len", "64", "--max-num-seqs", "2", "--max-num-batched-tokens", "64"
SLOW = """
import time
from jaxserve.engine import Engine
step = Engine._step
Engine._rounds = lambda self: 1
Engine._step = lambda self: (time.sleep(0.03), step(self))[1]
"""
HANG = SLOW + "Engine._launch = lambda self, plans: time.sleep(600)\n"


def serving(*arguments: str, **more: str) -> AbstractContextManager[Process]:
    return process("serve", *arguments, **more)


def client(url: str, **options: Any) -> httpx2.Client:
    return httpx2.Client(base_url=url, timeout=SOON, **options)


def begun(http: httpx2.Client, running: int, waiting: int) -> bool:
    return eventually(
        lambda: http.get("/stats").json()["requests"].items() >= {"running": running, "waiting": waiting}.items()
    )


def test_after_sigterm_all_that_was_accepted_is_answered_and_the_status_is_0(tiny_folder):
    with serving(str(tiny_folder), "--port", "0", *SMALL, plant=SLOW) as server:
        with client(server.url()) as http, ThreadPoolExecutor(6) as pool:
            whole = http.post("/v1/completions", json=LONG).json()["choices"]
            stream = http.post("/v1/completions", json=LONG | {"stream": True}).text.count("data: ")
            asked = [pool.submit(http.post, "/v1/completions", json=LONG | {"stream": i % 2 > 0}) for i in range(6)]
            assert begun(http, 2, 4)
            server.process.send_signal(signal.SIGTERM)
            assert eventually(lambda: http.get("/health").json() == {"status": "draining"})
            refused = http.post("/v1/completions", json=SHORT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            answers = [each.result() for each in asked]
        assert [answer.status_code for answer in answers] == [200] * 6
        assert [answer.json()["choices"] for answer in answers[::2]] == [whole] * 3
        said = whole[0]["text"]
        for answer in answers[1::2]:
            events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            assert "".join(event["choices"][0]["text"] for event in events) == said
            assert answer.text.count("data: ") == stream and answer.text.endswith("data: [DONE]\n\n")
        assert server.status() == 0


def test_a_second_ctrl_c_finishes_nothing_and_tells_everybody(tiny_folder):
    with serving(str(tiny_folder), "--port", "0", *SMALL, plant=SLOW) as server:
        with client(server.url()) as http, ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(http.post, "/v1/completions", json=LONG) for _ in range(3)]
            assert begun(http, 2, 1)
            server.process.send_signal(signal.SIGINT)
            assert eventually(lambda: http.get("/health").json() == {"status": "draining"})
            server.process.send_signal(signal.SIGINT)
            answers = [each.result() for each in asked]
        assert {answer.status_code for answer in answers} == {503}
        assert all("shut down before" in answer.json()["error"]["message"] for answer in answers)
        assert server.status() == 1


def test_a_step_that_hangs_ends_the_process_with_status_1_and_everybody_is_answered(tiny_folder):
    with serving(str(tiny_folder), "--port", "0", "--step-timeout", "1", *SMALL, plant=HANG) as server:
        with client(server.url()) as http, ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(http.post, "/v1/completions", json=SHORT | {"stream": i > 1}) for i in range(4)]
            answers = [each.result() for each in asked]
        for answer in answers:  # a stream may have begun
            said = answer.text.removeprefix("data: ").removesuffix("\n\ndata: [DONE]\n\n")
            assert json.loads(said)["error"]["code"] == "engine_failed"
        assert server.status() == 1


def test_keys_come_from_the_environment_and_each_request_is_a_line_of_json_with_its_id(tiny_folder):
    with serving(str(tiny_folder), "--port", "0", *SMALL, JAXSERVE_API_KEY="secret") as server:
        with client(server.url()) as http:
            assert http.post("/v1/completions", json=SHORT).status_code == 401
            http.headers["Authorization"] = "Bearer secret"
            answer = http.post("/v1/completions", json=SHORT, headers={"X-Request-Id": "mine-1"})
            assert (answer.status_code, answer.headers["X-Request-Id"]) == (200, "mine-1")
            other = http.post("/v1/completions", json=SHORT, headers={"X-Request-Id": 'no"id'})
            assert other.status_code == 200
        server.process.terminate()
        assert server.status() == 0
        refused, mine, others = [json.loads(line) for line in server.lines if line.startswith("{")]
        assert (refused["status"], refused["message"]) == (401, "POST /v1/completions")
        assert (mine["id"], mine["status"], mine["usage"]["completion_tokens"]) == ("mine-1", 200, 2)
        assert others["id"] == other.headers["X-Request-Id"] and re.fullmatch("[0-9a-f]{32}", others["id"])
        assert not any("secret" in line for line in server.lines)


def test_it_serves_https_with_a_certificate(tiny_folder, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {key} -out {certificate}"
    try:
        subprocess.run([*make.split(), "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl, which makes the certificate, is not installed")
    tls = "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)
    with serving(str(tiny_folder), "--port", "0", *SMALL, *tls) as server:
        url = server.url()
        assert url.startswith("https://127.0.0.1:")
        with client(url, verify=ssl.create_default_context(cafile=str(certificate))) as http:
            assert http.post("/v1/completions", json=SHORT).status_code == 200
        with Client(url) as told, pytest.raises(ServerError, match="is not trusted here; SSL_CERT_FILE"):
            told.get("/health")
        server.process.terminate()
        assert server.status() == 0


def test_what_it_can_not_begin_with_is_told_in_a_line_and_the_status_is_2(tiny_folder, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with serving(str(tiny_folder), "--port", port) as server:
            assert server.status() == 2
            (line,) = server.lines
            assert f"can't listen at 127.0.0.1, port {port}" in line and "--port" in line
    with serving(str(tmp_path / "nothing"), "--port", "0") as server:
        assert server.status() == 2
        (line,) = server.lines
        assert "nothing" in line
    with serving(str(tiny_folder), "--port", "0", JAXSERVE_API_KEY=" ") as server:
        assert server.status() == 2
        assert "JAXSERVE_API_KEY is empty" in server.lines[0]
