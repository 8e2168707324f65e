"""What goes wrong with clients, with the engine and with time; nobody is ever left without an answer."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx2
import pytest

from jaxserve import LLM, RequestError, SamplingParams
from jaxserve.server.run import Life, ServerOptions, listen
from jaxserve.server.service import Limits
from tests.jaxserve.conftest import SIZE, with_few_shapes
from tests.jaxserve.server.conftest import running, starting
from tests.waiting import SOON, eventually

pytestmark = pytest.mark.xdist_group("server")

LONG = {"prompt": [5, 7], "max_tokens": 120, "temperature": 0, "ignore_eos": True}
SHORT = LONG | {"max_tokens": 4}


@pytest.fixture
def make_llm(tiny_folder):
    def make(**options) -> LLM:
        llm = LLM(tiny_folder, **SIZE | options)
        with_few_shapes(llm.engine)
        llm.generate([[5, 7]], SamplingParams(max_tokens=2))  # compiled
        return llm

    return make


def slow(llm: LLM, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> None:
    """Steps that take as long as a large model's, of a token each."""
    step = llm.engine._step
    monkeypatch.setattr(llm.engine, "_rounds", lambda: 1)
    monkeypatch.setattr(llm.engine, "_step", lambda: (time.sleep(seconds), step())[1])


def ask(server, path="/v1/completions", **body):
    headers = body.pop("headers", {})
    with server.client() as http:
        return http.post(path, json=body, headers=headers)


def events(response) -> list:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_step_that_fails_fails_its_requests_and_the_server_goes_on(make_llm, monkeypatch):
    llm = make_llm(max_num_seqs=2)
    slow(llm, monkeypatch)
    with running(llm) as server, ThreadPoolExecutor(5) as pool:
        expected = ask(server, **LONG).json()["choices"]
        whole = [pool.submit(ask, server, **LONG)]
        streamed = [pool.submit(ask, server, **LONG, stream=True)]
        assert eventually(lambda: llm.engine.counters.running == 2)
        waiting = [pool.submit(ask, server, **LONG) for _ in range(2)]
        assert eventually(lambda: llm.engine.counters.waiting == 2)
        launch = llm.engine._launch

        def fail_once(plans):
            monkeypatch.setattr(llm.engine, "_launch", launch)
            raise MemoryError("no room")

        monkeypatch.setattr(llm.engine, "_launch", fail_once)
        (failed,) = [each.result() for each in whole]
        assert failed.status_code == 500
        assert failed.json()["error"]["message"] == "the engine failed in a step: MemoryError('no room')"
        assert failed.json()["error"]["type"] == "server_error"
        (stream,) = [each.result() for each in streamed]
        assert stream.status_code == 200
        assert "MemoryError" in events(stream)[-1]["error"]["message"]
        assert [each.result().json()["choices"] for each in waiting] == [expected] * 2
        with server.client() as http:
            assert http.get("/health").json() == {"status": "ready"}


def test_a_step_that_hangs_ends_the_server_and_everybody_is_told_at_once(make_llm, monkeypatch):
    llm = make_llm(max_num_seqs=1)
    with running(llm, step_timeout=0.5) as server, ThreadPoolExecutor(3) as pool, server.client() as http:
        hang = threading.Event()
        monkeypatch.setattr(llm.engine, "_step", lambda: hang.wait(SOON) and [])
        asked = [pool.submit(ask, server, **LONG, stream=stream) for stream in (False, False, True)]
        codes = set()
        while not server.statuses:
            try:
                health = http.get("/health")
                codes.add((health.status_code, health.json()["status"]))
            except httpx2.HTTPError:  # it has ended
                break
        whole, waiting, streamed = [each.result() for each in asked]
        assert whole.status_code == waiting.status_code == 503
        # The engine took the stream's request with the others, before the step that hangs, or it didn't any more.
        end = events(streamed)[-1] if streamed.status_code == 200 else streamed.json()
        for error in (whole.json()["error"], waiting.json()["error"], end["error"]):
            assert "a step has taken longer than 0.5 s" in error["message"]
            assert error["code"] == "engine_failed"
        assert eventually(lambda: server.statuses) and server.statuses == [1]
        assert codes <= {(200, "ready"), (503, "failed")}
        hang.set()


def test_an_engine_that_can_not_recover_ends_the_server(make_llm, monkeypatch):
    llm = make_llm()
    with running(llm) as server:
        monkeypatch.setattr(llm.engine, "_launch", lambda plans: 1 / 0)
        monkeypatch.setattr(llm.engine, "recover", lambda: 1 / 0)
        answer = ask(server, **LONG)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_failed")
        assert "ZeroDivisionError" in answer.json()["error"]["message"]
        assert eventually(lambda: server.statuses == [1])


def test_steps_that_fail_again_and_again_end_the_server(make_llm, monkeypatch):
    llm = make_llm(max_num_seqs=1)
    with running(llm) as server:
        monkeypatch.setattr(llm.engine, "_launch", lambda plans: 1 / 0)
        codes = [ask(server, **SHORT).status_code for _ in range(3)]
        assert codes[:2] == [500, 500] and codes[2] in (500, 503)
        assert eventually(lambda: server.statuses == [1])


def test_a_full_queue_is_told_with_when_to_come_again_and_loses_nobody(make_llm, monkeypatch):
    llm = make_llm(max_num_seqs=1, max_num_queued=2)
    slow(llm, monkeypatch)
    with running(llm) as server, ThreadPoolExecutor(8) as pool:
        expected = ask(server, **LONG).json()["choices"]
        first = pool.submit(ask, server, **LONG)
        assert eventually(lambda: llm.engine.counters.running == 1)
        others = [pool.submit(ask, server, **LONG) for _ in range(7)]
        answers = [each.result() for each in [first, *others]]
        refused = [each for each in answers if each.status_code == 429]
        assert len(refused) == 5
        for each in refused:
            assert int(each.headers["Retry-After"]) >= 1
            assert each.json()["error"]["code"] == "queue_full"
        assert [each.json()["choices"] for each in answers if each.status_code == 200] == [expected] * 3


def test_a_request_that_takes_longer_than_its_time_is_ended(make_llm, monkeypatch):
    llm = make_llm()
    slow(llm, monkeypatch)
    with running(llm, Limits(seconds=2.0)) as server:
        answer = ask(server, **LONG, headers={"X-Request-Timeout": "0.3"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert answer.headers["x-should-retry"] == "false"
        streamed = events(ask(server, **LONG, stream=True, headers={"X-Request-Timeout": "0.5"}))
        assert streamed[0]["choices"] and streamed[-1]["error"]["type"] == "timeout_error"
        assert ask(server, **LONG, headers={"X-Request-Timeout": "3600"}).status_code == 504  # the server's own limit
        assert ask(server, **SHORT).status_code == 200
        assert eventually(lambda: not llm.engine.busy)
        for wrong in ("soon", "-1", "nan", "inf"):
            assert ask(server, **SHORT, headers={"X-Request-Timeout": wrong}).status_code == 400


@pytest.mark.parametrize("place", ["tokenizer.encode", "engine.check"])
def test_time_runs_from_when_a_request_comes_not_from_when_it_is_queued(make_llm, monkeypatch, place):
    llm, go = make_llm(), threading.Event()
    with running(llm) as server:
        owner, name = place.split(".")
        monkeypatch.setattr(getattr(llm, owner), name, lambda *_: go.wait(SOON))
        answer = ask(server, prompt="t5 t7", max_tokens=4, headers={"X-Request-Timeout": "0.3"})
        go.set()
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True], ids=["queued", "running"])
def test_a_client_that_goes_away_is_not_served_any_more(make_llm, monkeypatch, stream, begun):
    llm = make_llm(max_num_seqs=1)
    slow(llm, monkeypatch)
    with running(llm) as server:
        with ThreadPoolExecutor(1) as pool:
            other = None if begun else pool.submit(ask, server, **LONG)
            if other:
                assert eventually(lambda: llm.engine.counters.running == 1)
            address = urlsplit(server.url)
            with socket.create_connection((address.hostname, address.port)) as connection:
                body = json.dumps(LONG | {"stream": stream})
                head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
                connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                count = llm.engine.counters
                assert eventually(lambda: count.waiting + count.running == (1 if begun else 2))
            if other:
                assert eventually(lambda: llm.engine.counters.waiting == 0)
                assert other.result().status_code == 200
            assert eventually(lambda: not llm.engine.busy)
            assert llm.engine.counters.pages_used == 0
            assert llm.engine.counters.generated_tokens < 250


def test_what_was_accepted_is_finished_before_the_server_ends_and_what_comes_is_refused(make_llm, monkeypatch):
    llm = make_llm(max_num_seqs=2)
    slow(llm, monkeypatch, 0.02)
    with running(llm) as server, ThreadPoolExecutor(6) as pool, server.client() as http:
        expected = ask(server, **LONG).json()["choices"]
        http.get("/health")  # a connection that stays
        asked = [pool.submit(ask, server, **LONG) for _ in range(6)]
        assert eventually(lambda: llm.engine.counters.running + llm.engine.counters.waiting == 6)
        server.life.end()
        assert eventually(lambda: server.life.service.state == "draining")
        refused = http.post("/v1/completions", json=SHORT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["Retry-After"] and refused.headers["Connection"] == "close"
        assert [each.result().json()["choices"] for each in asked] == [expected] * 6
        assert eventually(lambda: server.statuses == [0])


@pytest.mark.parametrize("how", ["a second signal", "its time"])
def test_a_server_that_is_to_end_now_tells_those_it_can_not_finish(make_llm, monkeypatch, how):
    llm = make_llm()
    slow(llm, monkeypatch, 0.2)
    with running(llm, drain_timeout=0.5 if how == "its time" else 600.0) as server, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask, server, **LONG, stream=stream) for stream in (False, True)]
        assert eventually(lambda: llm.engine.counters.running == 2)
        server.life.end()
        if how == "a second signal":
            assert eventually(lambda: server.life.service.state == "draining")
            server.life.end()
        whole, streamed = [each.result() for each in asked]
        assert whole.status_code == 503 and "shut down before" in whole.json()["error"]["message"]
        assert "shut down before" in events(streamed)[-1]["error"]["message"]
        assert eventually(lambda: server.statuses == [1])


def test_keys_are_asked_for_where_answers_are_given(make_llm):
    with running(make_llm(), Limits(concurrency=1), keys=["first", "second"]) as server, server.client() as http:
        for path in ("/v1/models", "/stats"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first"}):
                answer = http.get(path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        for key in ("first", "second"):
            assert http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/health", "/metrics", "/version", "/openapi.json", "/"):
            assert http.get(path).status_code == 200


def test_a_name_that_is_not_the_server_s_is_refused_where_there_are_no_keys(make_llm):
    with running(make_llm(), hosts=["127.0.0.1", "::1", "localhost"]) as server, server.client() as http:
        port = server.url.rpartition(":")[2]
        for name in (f"127.0.0.1:{port}", "localhost", f"[::1]:{port}", "LOCALHOST:80"):
            assert http.get("/v1/models", headers={"Host": name}).status_code == 200
        for name in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
            answer = http.get("/v1/models", headers={"Host": name})
            assert (answer.status_code, answer.json()["error"]["code"]) == (421, "unknown_host")


def test_a_key_has_as_many_requests_at_once_as_it_may(make_llm, monkeypatch):
    llm = make_llm()
    slow(llm, monkeypatch)
    keys = [{"Authorization": f"Bearer {key}"} for key in ("first", "second")]
    with running(llm, Limits(concurrency=2), keys=["first", "second"]) as server, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask, server, **LONG, headers=keys[0]) for _ in range(2)]
        assert eventually(lambda: llm.engine.counters.running == 2)
        refused = ask(server, **SHORT, headers=keys[0])
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
        assert ask(server, **SHORT, headers=keys[1]).status_code == 200
        assert [each.result().status_code for each in asked] == [200] * 2
        assert ask(server, **SHORT, headers=keys[0]).status_code == 200


def test_forms_that_take_long_to_prepare_keep_nobody_else_waiting(make_llm, monkeypatch):
    llm, go = make_llm(), threading.Event()
    make = llm.engine._guides.make
    monkeypatch.setattr(
        llm.engine._guides, "make", lambda params: (params.structured_outputs and go.wait(SOON), make(params))[1]
    )
    with running(llm) as server, ThreadPoolExecutor(40) as pool:  # more than asyncio has threads
        slowly = [pool.submit(ask, server, **SHORT, structured_outputs={"regex": "t5"}) for _ in range(40)]
        assert eventually(lambda: server.life.service._busy[None] == 40)
        assert ask(server, **SHORT | {"prompt": "t5 t7"}).status_code == 200
        assert not any(each.done() for each in slowly)
        go.set()
        assert all(each.result().status_code in (200, 400) for each in slowly)


def test_limits_of_a_server_are_told(make_llm, monkeypatch):
    limits = Limits(body_bytes=1000, prompt_tokens=3, answers=4, max_tokens=5)
    with running(make_llm(), limits) as server, server.client() as http:
        pushy = ask(server, prompt=[1], priority=-1)
        assert (pushy.status_code, pushy.json()["error"]["param"]) == (400, "priority")
        too_long = ask(server, prompt=[1] * 4)
        assert "prompt has 4 tokens; this server takes 3" in too_long.json()["error"]["message"]
        assert "max_tokens = 6: this server gives 5 at most" in ask(server, prompt=[1], max_tokens=6).text
        assert ask(server, prompt=[1], ignore_eos=True).json()["usage"]["completion_tokens"] == 5
        assert "at most 4" in ask(server, prompt=[[1], [2]], n=3).text
        monkeypatch.setattr(server.llm.tokenizer, "encode", lambda *_: pytest.fail("work before the count is known"))
        assert "n = 5 answers" in ask(server, prompt=["t1"] * 5).text
        monkeypatch.undo()
        large = ask(server, prompt="x" * 1000)
        assert (large.status_code, large.json()["error"]["type"]) == (413, "invalid_request_error")
        chat = {"messages": [{"role": "user", "content": "t5"}], "ignore_eos": True}
        assert "no default chat template" in ask(server, "/v1/chat/completions", **chat).json()["error"]["message"]
        form = http.post("/v1/completions", content=b'{"prompt": "t1"}', headers={"Content-Type": "text/plain"})
        assert form.status_code == 415 and "text/plain: it must be application/json" in form.text
        missing = http.get("/v1/nothing")
        assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
        assert http.get("/v1/completions").status_code == 405


def test_while_the_model_is_loaded_the_server_says_so(make_llm):
    llm, go = make_llm(), threading.Event()
    with starting(lambda: (go.wait(SOON), llm)[1]) as server, server.client() as http:
        assert (http.get("/health").status_code, http.get("/health").json()) == (503, {"status": "loading"})
        for path in ("/v1/models", "/metrics", "/stats"):
            assert http.get(path).json()["error"]["code"] == "loading"
        early = ask(server, **SHORT)
        assert (early.status_code, early.json()["error"]["code"]) == (503, "loading")
        go.set()
        assert eventually(lambda: http.get("/health").status_code == 200)
        assert ask(server, **SHORT).status_code == 200
    assert server.statuses == [0]


def test_a_server_that_is_to_end_while_it_loads_does_not_wait_for_that():
    go = threading.Event()
    with starting(lambda: go.wait(SOON)) as server, server.client() as http:
        assert http.get("/health").status_code == 503
    assert server.statuses == [0]
    go.set()


def test_a_certificate_that_is_none_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "cert.pem").write_text("nothing")
    life = Life(lambda: 1 / 0, ServerOptions(names=["x"], tls={"ssl_certfile": tmp_path / "cert.pem"}), print)
    with listen("127.0.0.1", 0) as sock, pytest.raises(RequestError, match="https can't be served: .* PEM files"):
        asyncio.run(life.live(sock))


def test_a_port_that_is_taken_is_named():
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(RequestError, match=f"can't listen at 127.0.0.1, port {port}: .*choose another"):
            listen("127.0.0.1", port)
