"""Log lines and ids of requests."""

import json
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from jaxserve.server.access import JsonLines
from jaxserve.server.completions import CompletionCall
from tests.waiting import eventually

pytestmark = pytest.mark.xdist_group("server")


@pytest.fixture
def lines(caplog):
    """The lines that were logged so far, as a program reads them."""
    caplog.set_level(logging.INFO, "jaxserve.server")
    return lambda: [json.loads(JsonLines().format(record)) for record in caplog.records]


def test_a_request_has_a_line_with_what_it_used(server, lines):
    with server.client() as http:
        answer = http.post("/v1/completions", json={"prompt": "def f", "max_tokens": 3, "ignore_eos": True})
    assert eventually(lines)
    (line,) = lines()
    assert (line["level"], line["message"], line["status"]) == ("info", "POST /v1/completions", 200)
    assert line["id"] == answer.headers["X-Request-Id"]
    assert answer.json()["id"] == line["answer"]
    assert line["usage"]["completion_tokens"] == 3
    assert 0 < line["first_byte_ms"] <= line["duration_ms"]


def test_a_client_s_own_id_is_kept_if_it_can_stand_in_a_line(server, lines):
    with server.client() as http:
        assert http.get("/version", headers={"X-Request-Id": "mine-7"}).headers["X-Request-Id"] == "mine-7"
        other = http.get("/version", headers={"X-Request-Id": "no; spaces"}).headers["X-Request-Id"]
    assert len(other) == 32
    assert eventually(lambda: len(lines()) == 2)
    assert [line["id"] for line in lines()] == ["mine-7", other]


def test_clients_with_the_same_id_get_their_own_answers(server):
    body = {"max_tokens": 20, "temperature": 0, "ignore_eos": True, "n": 2}
    prompts = ["def quicksort(items):", "import os"] * 3

    def ask(prompt):
        with server.client() as http:
            return http.post("/v1/completions", json=body | {"prompt": prompt}, headers={"X-Request-Id": "same"}).json()

    alone = [ask(prompt)["choices"] for prompt in prompts[:2]]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, prompts))
    assert [answer["choices"] for answer in answers] == alone * 3
    assert len({answer["id"] for answer in answers}) == 6


def test_probes_are_not_logged(server, lines):
    with server.client() as http:
        for path in ("/health", "/metrics", "/stats", "/version"):
            http.get(path)
    assert eventually(lines)
    assert [line["message"] for line in lines()] == ["GET /version"]


def test_a_bug_is_logged_with_its_place_and_told_without_it(server, lines, monkeypatch):
    monkeypatch.setattr(server.llm.tokenizer, "encode", lambda *_: 1 / 0)
    with server.client() as http:
        answer = http.post("/v1/completions", json={"prompt": "def f"})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the server has a bug (ZeroDivisionError); its log says more"
    assert eventually(lambda: len(lines()) == 2)
    bug, line = lines()
    assert "ZeroDivisionError" in bug["exception"]
    assert (line["status"], line["error"]) == (500, answer.json()["error"]["message"])
    assert line["id"] == answer.headers["X-Request-Id"]


def test_what_breaks_a_stream_is_logged_though_its_status_was_good(server, lines, monkeypatch):
    monkeypatch.setattr(CompletionCall, "_grow", lambda *_: 1 / 0)
    with server.client() as http:
        answer = http.post("/v1/completions", json={"prompt": "def f", "stream": True})
    assert answer.status_code == 200 and "the server has a bug (ZeroDivisionError)" in answer.text
    assert eventually(lambda: len(lines()) == 2)
    bug, line = lines()
    assert "ZeroDivisionError" in bug["exception"]
    assert (line["status"], line["error"]) == (200, "the server has a bug (ZeroDivisionError); its log says more")


def test_who_asks_and_what_was_wrong_is_in_the_line_but_not_all_of_a_long_text(server, lines):
    with server.client() as http:
        http.post("/v1/completions", json={"prompt": "def f", "user": "ada", "max_tokens": 1})
        http.post("/v1/completions", json={"prompt": "def f", "model": "m" * 10_000})
    assert eventually(lambda: len(lines()) == 2)
    good, wrong = lines()
    assert good["user"] == "ada" and "error" not in good
    assert wrong["error"].startswith("model 'mmm") and len(wrong["error"]) == 500


def test_of_a_client_that_left_before_it_was_answered_the_log_says_so(server, lines):
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
    assert eventually(lines)
    assert [line["status"] for line in lines()] == [499]
