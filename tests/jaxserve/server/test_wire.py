"""Requests as no client library writes them."""

import json
import socket
from collections.abc import Iterator

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.server.service import Limits
from jaxserve.server.wire import HEAD
from tests.jaxserve.conftest import SIZE, with_few_shapes
from tests.jaxserve.server.conftest import Running, running
from tests.waiting import SOON, eventually

pytestmark = pytest.mark.xdist_group("server")

POST = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": [5], "max_tokens": 1}'
LAST = "Connection: close\r\n"


@pytest.fixture(scope="module")
def server(tiny_folder) -> Iterator[Running]:
    llm = LLM(tiny_folder, **SIZE)
    with_few_shapes(llm.engine)
    llm.tokenizer.chat_templates = {"default": "{{ messages[0]['content'] }}"}
    llm.generate([[5, 7]], SamplingParams(max_tokens=2))  # compiled
    with running(llm, Limits(seconds=2.0, priority=True)) as server:
        yield server


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), SOON)


def say(server: Running, *parts: bytes) -> bytes:
    """All that comes until the server closes the connection."""
    said = b""
    with connect(server) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            while more := connection.recv(1 << 16):
                said += more
        except ConnectionError:  # closed while there was more to read
            pass
    return said


def post(server: Running, body: bytes, path: str = "/v1/completions") -> tuple[int, dict]:
    with server.client() as http:
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
        return answer.status_code, answer.json()


def with_length(body: bytes, more: str = "") -> bytes:
    return f"{POST}{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_a_head_without_an_end_is_refused_before_it_fills_the_memory(server):
    many = b"X: x\r\n" * (HEAD // 6)
    for head in (f"{POST}X: ".encode() + b"x" * HEAD, b"GET /" + b"x" * HEAD, POST.encode() + many):
        assert b"has more than 1048576 bytes" in say(server, head)


def test_bodies_larger_than_a_head_may_be_are_read(server):
    large = json.dumps({"prompt": [5], "max_tokens": 1, "user": "x" * (3 << 20)}).encode()
    said = say(server, with_length(large) + with_length(large, LAST))
    assert said.count(b"HTTP/1.1 200 ") == 2


def test_requests_that_come_at_once_are_answered_in_their_order(server):
    requests = [{"prompt": [token], "max_tokens": 1, "echo": True} for token in (5, 6, 7)]
    *first, last = [json.dumps(each).encode() for each in requests]
    said = say(server, b"".join(map(with_length, first)) + with_length(last, LAST)).decode()
    assert said.count("HTTP/1.1 200 ") == 3
    assert said.index('"text":"t5') < said.index('"text":"t6') < said.index('"text":"t7')


def test_a_body_in_parts_of_any_length_is_put_together(server):
    parts = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:1], BODY[1:17], BODY[17:]))
    said = say(server, f"{POST}{LAST}Transfer-Encoding: chunked\r\n\r\n".encode(), parts, b"0\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET\r\n\r\n",
        f"{POST}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(),  # smuggled
        f"{POST}Content-Length: 5\r\nContent-Length: 6\r\n\r\n".encode(),
        f"{POST}Content-Length: -5\r\n\r\n".encode(),
        f"{POST}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
    ],
)
def test_what_is_no_request_is_refused(server, raw):
    assert say(server, raw).startswith(b"HTTP/1.1 400 ")


def test_a_body_that_does_not_come_is_waited_for_no_longer_than_for_an_answer(server):
    said = say(server, f"{POST}Content-Length: 100\r\n\r\n".encode() + b'{"prompt"')
    assert said.startswith(b"HTTP/1.1 408 ") and b"the body has not come within 2 s" in said


def test_a_client_that_leaves_amid_its_body_leaves_nothing(server):
    with connect(server) as connection:
        connection.sendall(f"{POST}Content-Length: 100\r\n\r\n".encode() + b'{"prompt"')
    with server.client() as http:
        assert http.get("/health").status_code == 200
    assert eventually(lambda: server.life.service.idle.is_set())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xef\xbb\xbf" + BODY,
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00 "}',
        b'{"prompt": [5], "temperature": NaN}',
        b'{"prompt": [5], "temperature": 1e999}',
        b'{"prompt": [5], "seed": ' + b"9" * 100_000 + b"}",
        b'{"prompt": [5], "logit_bias": {"' + b"9" * 5000 + b'": 1}}',
        b'{"prompt": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
        b'{"prompt": [5], "structured_outputs": {"json": {"default": ' + b"[" * 900 + b"]" * 900 + b"}}}",
        b'{"prompt": [5], "structured_outputs": {"regex": "' + b"(" * 5000 + b"a" + b")" * 5000 + b'"}}',
        b'{"prompt": [5], "structured_outputs": {"grammar": "start: ' + b"(" * 50_000 + b"t" + b")" * 50_000 + b'"}}',
    ],
    ids=range(13),
)
def test_a_body_that_can_not_be_meant_is_the_client_s_fault(server, body):
    status, answer = post(server, body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_messages_nested_deeply_are_rendered_or_refused(server, depth):
    nested = b"[" * depth + b"]" * depth
    body = b'{"messages": [{"role": "user", "content": "t5", "more": %s}], "max_tokens": 1}' % nested
    assert post(server, body, "/v1/chat/completions")[0] in (200, 400)


def test_nul_a_field_twice_and_numbers_without_bounds_are_taken_for_what_they_say(server):
    for body in (
        b'{"prompt": "t5\\u0000t6", "max_tokens": 1}',
        b'{"prompt": [500], "prompt": [7], "max_tokens": 1}',
        b'{"prompt": [5], "max_tokens": 1, "seed": -99999999999999999, "priority": 9007199254740993}',
        b'{"prompt": [5], "max_tokens": 999999999999999999, "stop_token_ids": [0,1,2,3,4,5,6,7,8,9]}',
    ):
        assert post(server, body)[0] == 200


def test_lists_that_would_slow_every_token_are_refused(server):
    for name, given in {
        "stop": ["x"] * 129,
        "bad_words": ["x" * 4097],
        "logit_bias": {str(token): 0 for token in range(2**18 + 1)},
        "allowed_token_ids": [5] * (2**18 + 1),
    }.items():
        status, answer = post(server, json.dumps({"prompt": [5], name: given}).encode())
        assert (status, answer["error"]["param"]) == (400, name) and "at most" in answer["error"]["message"]
    status, answer = post(server, json.dumps({"prompt": ["t5"] * 200_000}).encode())
    assert status == 400 and "n = 200000 answers" in answer["error"]["message"]
