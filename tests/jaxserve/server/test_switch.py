"""A server that serves another model instead: nobody loses an answer, and there is never room for two."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxserve import LLM, RequestError, SamplingParams
from jaxserve.server.run import Life
from tests.jaxserve.conftest import SIZE, with_few_shapes
from tests.jaxserve.server import conftest
from tests.jaxserve.server.conftest import starting
from tests.jaxserve.server.test_faults import ask, events
from tests.waiting import SOON, eventually

pytestmark = pytest.mark.xdist_group("server")

LONG = {"prompt": [5, 7], "max_tokens": 60, "temperature": 0, "ignore_eos": True}
SHORT = LONG | {"max_tokens": 4}
LOAD = "/models/load"


class Models:
    """What a server of tests can load: the same weights by their dtypes, with notes of how many are in memory."""

    def __init__(self, folder):
        self._folder = folder
        self.weights: list[weakref.ref] = []
        self.loaded: list[str] = []
        self.alive: list[int] = []  # models in memory when another was to be loaded
        self.go = threading.Event()
        self.go.set()
        self.broken: set[str] = set()
        self.pause = 0.01  # seconds, before each step

    def load(self, name: str) -> LLM:
        gc.collect()
        self.alive.append(sum(weights() is not None for weights in self.weights))
        assert self.go.wait(SOON)
        llm = LLM(self._folder, dtype=name, model_cache="off", **SIZE | {"max_num_seqs": 2})
        self.weights.append(weakref.ref(llm.engine._model.embed))  # type: ignore[attr-defined]
        if name in self.broken:
            raise MemoryError("no room")
        with_few_shapes(llm.engine)
        llm.generate([[5, 7]], SamplingParams(max_tokens=2))  # compiled
        step = llm.engine._step  # type: ignore[attr-defined]
        llm.engine._step = lambda: (time.sleep(self.pause), step())[1]  # type: ignore[attr-defined]
        llm.engine._rounds = lambda: 1  # type: ignore[attr-defined]
        self.loaded.append(name)
        return llm

    def find(self, name: str):
        if name not in ("float32", "bfloat16", "float16"):
            raise RequestError(f"model = {name!r}: it is not here")
        return lambda: self.load(name)


@pytest.fixture
def models(tiny_folder, monkeypatch):
    found = Models(tiny_folder)
    monkeypatch.setattr(conftest, "Life", lambda load, options, tell: Life(load, options, tell, found.find))
    return found


def switchable(models: Models, **options):
    return starting(lambda: models.load("float32"), **options)


def ready(server) -> bool:
    return eventually(lambda: server.life.service.state == "ready")


def test_what_was_accepted_is_finished_and_what_comes_is_told_to_come_again(models):
    with switchable(models) as server, ThreadPoolExecutor(8) as pool, server.client() as http:
        assert ready(server)
        whole = ask(server, **LONG).json()["choices"][0]["text"]
        asked = [pool.submit(ask, server, **LONG, stream=i % 2 > 0) for i in range(4)]
        assert eventually(lambda: server.life.service.open == 4)
        models.go.clear()
        switching = pool.submit(ask, server, LOAD, model="bfloat16")
        assert eventually(lambda: http.get("/health").json() == {"status": "loading"})
        refused = ask(server, **SHORT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
        assert refused.headers["Retry-After"] == "5"
        another = ask(server, LOAD, model="float16")
        assert (another.status_code, another.json()["error"]["code"]) == (503, "loading")
        answers = [each.result() for each in asked]
        assert [answer.json()["choices"][0]["text"] for answer in answers[::2]] == [whole] * 2
        for answer in answers[1::2]:
            assert "".join(event["choices"][0]["text"] for event in events(answer)) == whole
        assert eventually(lambda: len(models.alive) == 2) and http.get("/v1/models").status_code == 503
        models.go.set()
        switched = switching.result()
        assert switched.status_code == 200 and switched.json()["model"] == "bfloat16"
        assert models.alive == [0, 0] and models.loaded == ["float32", "bfloat16"]
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["bfloat16"]
        assert ask(server, **SHORT).status_code == 200
        assert ask(server, **SHORT, model="tiny").status_code == 404
        assert 'model_name="bfloat16"' in http.get("/metrics").text
        assert ask(server, LOAD, model="tiny").status_code == 200  # its name at the start
        assert ask(server, **LONG, model="alias").json()["choices"][0]["text"] == whole
        assert ask(server, LOAD, model="alias").json()["seconds"] < 1  # it is served already
        assert models.alive == [0] * 3
    assert server.statuses == [0]


def test_a_model_that_can_not_be_loaded_leaves_the_one_before(models):
    models.broken.add("float16")
    with switchable(models) as server:
        assert ready(server)
        whole = ask(server, **SHORT).json()["choices"]
        failed = ask(server, LOAD, model="float16")
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "not_loaded")
        said = failed.json()["error"]["message"]
        assert said == "float16 could not be loaded: MemoryError: no room; tiny is served again"
        assert models.alive == [0] * 3 and models.loaded == ["float32", "float32"]
        assert ask(server, **SHORT, model="tiny").json()["choices"] == whole
        unknown = ask(server, LOAD, model="/etc")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        assert ask(server, LOAD, other="x").status_code == 400


def test_without_any_model_the_server_ends(models):
    with switchable(models) as server:
        assert ready(server)
        models.broken |= {"float16", "float32"}
        failed = ask(server, LOAD, model="float16")
        assert failed.status_code == 500 and "nor could tiny again: MemoryError: no room" in failed.text
        assert eventually(lambda: server.statuses == [1])


def test_answers_that_take_too_long_are_given_up_and_told_so(models):
    with switchable(models, drain_timeout=0.2) as server, ThreadPoolExecutor(2) as pool:
        assert ready(server)
        models.pause = 0.05  # seconds; 110 of them are many more than what follows takes
        asked = pool.submit(ask, server, **LONG | {"max_tokens": 110})
        streamed = pool.submit(ask, server, **LONG | {"max_tokens": 110}, stream=True)
        assert eventually(lambda: server.life.service.open == 2)
        time.sleep(0.1)
        assert ask(server, LOAD, model="bfloat16").status_code == 200
        lost = asked.result()
        assert (lost.status_code, lost.json()["error"]["code"]) == (503, "shut_down")
        assert "another model is loaded" in lost.json()["error"]["message"]
        assert "another model is loaded" in streamed.result().text
        assert models.alive == [0, 0] and ask(server, **SHORT).status_code == 200


def test_a_server_that_is_to_end_while_it_loads_ends(models):
    with switchable(models) as server, ThreadPoolExecutor(1) as pool:
        assert ready(server)
        models.go.clear()
        switching = pool.submit(ask, server, LOAD, model="bfloat16")
        assert eventually(lambda: len(models.alive) == 2)
        server.life.end()
        answer = switching.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert eventually(lambda: server.statuses == [0])
        models.go.set()


def test_a_key_guards_it(models):
    with switchable(models, keys=["secret"]) as server:
        assert ready(server)
        assert ask(server, LOAD, model="bfloat16").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert ask(server, LOAD, model="bfloat16", headers=headers).status_code == 200


def test_a_server_of_one_model_has_no_other(tiny_folder):
    def load() -> LLM:
        llm = LLM(tiny_folder, **SIZE)
        with_few_shapes(llm.engine)
        return llm

    with starting(load) as server:
        assert ready(server)
        refused = ask(server, LOAD, model="other")
        assert refused.status_code == 404 and "no other model" in refused.json()["error"]["message"]
