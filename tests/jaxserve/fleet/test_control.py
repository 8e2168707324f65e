"""Router and instances over sockets; the engines behind these are pretended."""

import socket
import threading
import time
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import pytest

from jaxserve.counters import Counters
from jaxserve.fleet import worker as worker_module
from jaxserve.fleet.control import Control
from jaxserve.fleet.health import Patience
from jaxserve.fleet.instance import Local
from jaxserve.fleet.worker import Worker, knock
from jaxserve.parallel.errors import EngineError, RequestError
from jaxserve.request import Output
from jaxserve.serving import Memory
from tests.jaxserve.fleet.fakes import PAGE, about, asked, make_fleet, said

TOKEN = b"known to all"
SOON = 30.0
"""Seconds in which what should happen has happened."""


class Talker:
    """An engine that says a token of each answer in a step."""

    def __init__(self):
        self.requests, self.counters, self.memory = {}, Counters(pages=64, page_size=PAGE, slots=4), Memory(1, 2)
        self.steps, self.go, self.fault = 0, threading.Event(), None
        self.go.set()

    @property
    def busy(self):
        return bool(self.requests)

    def add(self, request):
        if request.prompt_token_ids == (13,):
            raise RequestError("13 is not served here")
        if request.prompt_token_ids == (17,):
            raise KeyError("17")
        self.requests[request.id] = [request, len(request.answered)]

    def abort(self, id):
        self.requests.pop(id, None)

    def step(self):
        self.go.wait(SOON)
        time.sleep(0.002)
        if self.fault:
            raise self.fault
        outputs = []
        for id, state in list(self.requests.items()):
            request, place = state
            state[1] += 1
            count = request.params.max_tokens
            token = said(request.prompt_token_ids, request.params.seed, count)[place]
            reason = "length" if place + 1 == count else None
            outputs.append(Output(id, text=f"{token} ", token_ids=(token,), finish_reason=reason))
            if reason:
                del self.requests[id]
        return outputs

    def recover(self):
        raise RuntimeError("it can't")

    def expert_load(self):
        return np.zeros((0, 0))


class Site:
    """A router that listens, and processes of instances, each in a thread."""

    def __init__(self, **options):
        self.fleet = make_fleet(**options)
        self.control = Control(self.fleet, TOKEN, period=0.02)
        self.workers, self.threads, self.errors, self.lines = [], [], [], []

    def start(self, name, role="decode", token=TOKEN, router=None, **other):
        engine = Talker()
        local = Local(engine, about(name, role, **other))
        worker = Worker(local, router or self.control.address, token, self.lines.append, drain_timeout=SOON)

        def run():
            try:
                worker.run()
            except ValueError as error:
                self.errors.append(error)
            finally:
                local.close()

        thread = threading.Thread(target=run)
        thread.start()
        self.workers.append(worker)
        self.threads.append(thread)
        return engine, worker, thread

    def until(self, condition):
        end = time.monotonic() + SOON
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)

    def states(self):
        return self.fleet.members.states()

    def answers(self, count=None):
        """All that the fleet says until it is not busy, or so many tokens of it."""
        found, end = {}, time.monotonic() + SOON
        while self.fleet.busy and time.monotonic() < end:
            for output in self.fleet.step():
                found.setdefault(output.request_id, []).append(output)
            if count and sum(len(output.token_ids) for each in found.values() for output in each) >= count:
                return found
        assert count or not self.fleet.busy
        return found


class Way:
    """A way to an address, on which connections can fall silent without an end."""

    def __init__(self, address):
        self._target, self._silent, self._ends = address, threading.Event(), []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self._threads = [threading.Thread(target=self._listen)]
        self._threads[0].start()

    def silence(self):
        """Nothing that is sent on the connections there are arrives any more; others are as they should be."""
        self._silent.set()
        self._silent = threading.Event()

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        for end in self._ends:
            end.close()
        for thread in self._threads:
            thread.join(SOON)
        self._listener.close()

    def _listen(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            for source, target in ((near, far), (far, near)):
                source.settimeout(0.05)
                self._ends.append(source)
                pump = threading.Thread(target=self._pump, args=[source, target, self._silent])
                pump.start()
                self._threads.append(pump)

    @staticmethod
    def _pump(source, target, silent):
        try:
            while not silent.is_set():
                try:
                    if not (data := source.recv(1 << 16)):
                        return target.shutdown(socket.SHUT_WR)
                    target.sendall(data)
                except TimeoutError:
                    continue
        except OSError:
            pass  # one end has gone


@contextmanager
def site(**options):
    stage = Site(**options)
    with ExitStack() as stack:
        stack.callback(stage.control.close)
        try:
            yield stage
        finally:
            for worker in stage.workers:
                worker.leave()
                worker.leave()
            for thread in stage.threads:
                thread.join(SOON)
                assert not thread.is_alive()


def tokens(outputs):
    return tuple(token for output in outputs for token in output.token_ids)


def test_instances_join_are_asked_and_answer():
    with site() as stage:
        stage.start("P1", "prefill")
        stage.start("D1")
        stage.until(lambda: len(stage.states()) == 2)
        for i in range(8):
            stage.fleet.add(asked(str(i), (5, i), 6, seed=i))
        found = stage.answers()
        assert {id: tokens(outputs) for id, outputs in found.items()} == {str(i): said((5, i), i, 6) for i in range(8)}
        assert stage.fleet.counters.pages == 128


def test_a_connection_that_ends_is_noticed_at_once_and_others_go_on():
    with site(patience=Patience(dead_after=1000.0)) as stage:
        one, worker, _ = stage.start("D1")
        stage.until(lambda: stage.states())
        stage.fleet.add(asked("x", (5,), 50, seed=3))
        begun = stage.answers(count=5)["x"]
        one.go.clear()
        stage.start("D2")
        stage.until(lambda: len(stage.states()) == 2)
        worker._line.cut()
        rest = stage.answers()["x"]
        one.go.set()
        assert tokens([*begun, *rest]) == said((5,), 3, 50)
        assert stage.fleet.tally.lost == {"gone": 1} and stage.fleet.tally.recovery.count == 1
        stage.until(lambda: len(stage.states()) == 2)  # it has come back, and has nothing to do
        stage.until(lambda: not one.busy)


def test_an_instance_that_hangs_while_its_heart_beats_is_lost():
    with site(patience=Patience(slow_after=0.1, hung_after=0.4, dead_after=1000.0)) as stage:
        one, _, _ = stage.start("D1")
        stage.until(lambda: stage.states())
        stage.fleet.add(asked("x", (5,), 50, seed=3))
        begun = stage.answers(count=5)["x"]
        one.go.clear()
        stage.until(lambda: (stage.fleet.step(), stage.fleet.tally.lost)[1])
        assert stage.fleet.tally.lost == {"hung": 1}
        stage.start("D2")
        rest = stage.answers()["x"]
        one.go.set()
        told = tokens(rest)  # nobody kept what came while it began to hang
        assert len(tokens(begun)) + len(told) <= 50 and told == said((5,), 3, 50)[-len(told) :]


def test_an_instance_that_hears_nothing_of_the_router_stops_its_work_and_dials_again():
    with site(patience=Patience(dead_after=1.0)) as stage, closing(Way(stage.control.address)) as way:
        one, _, _ = stage.start("D1", router=way.address)
        stage.until(lambda: stage.states())
        stage.fleet.add(asked("x", (5,), 50, seed=3))
        begun = stage.answers(count=5)["x"]
        one.go.clear()
        way.silence()
        stage.until(lambda: "the router is gone: nothing was heard of it for 1 s; waiting for one" in stage.lines)
        one.go.set()
        stage.until(lambda: not one.busy)  # though nobody has said so
        rest = stage.answers()["x"]  # of the same instance, which has joined again
        assert tokens([*begun, *rest]) == said((5,), 3, 50)
        assert stage.fleet.tally.lost == {"dead": 1}


def test_a_silent_instance_is_noticed_though_nothing_is_asked():
    with site(patience=Patience(dead_after=1.0)) as stage, closing(Way(stage.control.address)) as way:
        stage.start("D1", router=way.address)
        stage.until(lambda: stage.states())
        way.silence()
        stage.until(lambda: stage.fleet.tally.lost == {"dead": 1})


def test_a_router_that_has_nothing_to_say_is_not_taken_for_lost():
    with site(patience=Patience(dead_after=1.0)) as stage:
        stage.start("D1")
        stage.until(lambda: stage.states())
        time.sleep(2.0)
        assert len(stage.lines) == 1 and stage.states() == {"D1": ("decode", "healthy")}


def test_an_engine_that_fails_ends_its_process_and_the_fleet_goes_on():
    with site() as stage:
        one, _, thread = stage.start("D1")
        stage.until(lambda: stage.states())
        stage.fleet.add(asked("x", (5,), 50, seed=3))
        begun = stage.answers(count=5)["x"]
        one.fault = RuntimeError("no more")
        stage.start("D2")
        rest = stage.answers()["x"]
        assert tokens([*begun, *rest]) == said((5,), 3, 50)
        thread.join(SOON)
        assert isinstance(stage.errors[0], EngineError)


def test_an_instance_that_is_to_leave_finishes_first():
    with site() as stage:
        stage.start("D1")
        stage.until(lambda: stage.states())
        stage.fleet.add(asked("x", (5,), 100, seed=3))
        begun = stage.answers(count=5)["x"]
        stage.workers[0].leave()
        stage.until(lambda: stage.states().get("D1") == ("decode", "draining"))
        stage.fleet.add(asked("y", (5,), 3, seed=4))
        rest = stage.answers(count=95)
        assert tokens([*begun, *rest["x"]]) == said((5,), 3, 100) and "y" not in rest
        stage.threads[0].join(SOON)
        assert not stage.threads[0].is_alive() and stage.fleet.tally.retries == 0
        assert not stage.fleet.tally.lost and "finishing 1 answer, 30 s at most" in stage.lines
        stage.start("D2")
        assert tokens(stage.answers()["y"]) == said((5,), 4, 3)


def test_what_an_instance_refuses_is_told():
    with site() as stage:
        stage.start("D1")
        stage.until(lambda: stage.states())
        stage.fleet.add(asked("x", (13,)))
        stage.fleet.add(asked("y", (5,), stop="\ud800"))
        stage.fleet.add(asked("z", (17,)))
        stage.fleet.add(asked("well", (5,), 3, seed=4))
        found = stage.answers()
        assert found["x"][0].error == "D1 refuses it: 13 is not served here"
        assert found["z"][0].error == "D1 refuses it: '17'"
        assert tokens(found["well"]) == said((5,), 4, 3)
        assert "can't be written as UTF-8" in found["y"][0].error


def test_who_does_not_know_the_token_or_does_not_fit_is_sent_away_with_the_reason():
    with site() as stage:
        *_, thread = stage.start("D1", token=b"another")
        thread.join(SOON)
        *_, thread = stage.start("D1", max_model_len=64)
        thread.join(SOON)
        first, second = map(str, stage.errors)
        assert "lets nobody in who has another token" in first
        assert second == "max_model_len = 64: the router's is 128; give both the same"
        assert not stage.states()


def test_who_knocks_learns_whether_it_will_be_let_in_and_has_not_joined(caplog):
    with site() as stage:
        for length in (None, 128):
            knock(stage.control.address, TOKEN, length, stage.lines.append)
        with pytest.raises(RequestError, match="has another token; give both the same --fleet-token"):
            knock(stage.control.address, b"another", None, stage.lines.append)
        with pytest.raises(RequestError, match="max_model_len = 64: the router's is 128; give both the same"):
            knock(stage.control.address, TOKEN, 64, stage.lines.append)
        assert not stage.lines
        stage.start("D1")
        stage.until(lambda: stage.states())
        assert "an instance was not let in" not in caplog.text


def test_where_no_router_is_one_may_come_and_that_is_told(monkeypatch):
    lines = []
    knock(("127.0.0.1", 1), TOKEN, None, lines.append)
    monkeypatch.setattr(worker_module, "SHORT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        knock((host, port), TOKEN, None, lines.append)
    assert lines[0].startswith("there is no router yet: 127.0.0.1:1 does not answer")
    assert lines[1].startswith(f"{host}:{port} does not speak as a router") and "--control-port" in lines[1]


@pytest.mark.parametrize("period", [0, -1.0, 2.0, 3.0])
def test_instances_that_would_be_lost_between_two_signs_are_refused(period):
    fleet = make_fleet(patience=Patience(dead_after=2.0))
    with pytest.raises(RequestError, match=f"period = {period:g}: it must be above 0, and below dead_after, 2"):
        Control(fleet, TOKEN, period=period)


def test_an_instance_waits_for_a_router_and_says_so_once():
    with site() as stage:
        _, worker, thread = stage.start("D1", router=("127.0.0.1", 1))
        stage.until(lambda: stage.lines)
        time.sleep(0.5)
        assert len(stage.lines) == 1 and stage.lines[0].startswith(
            "waiting for the router: 127.0.0.1:1 does not answer"
        )
        worker.leave()
        thread.join(SOON)


def test_a_port_that_is_taken_is_named():
    with site() as stage:
        with pytest.raises(RequestError, match="choose another --control-port"):
            Control(stage.fleet, TOKEN, port=stage.control.address[1])
