"""The router, with instances that do what they are told."""

import re

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxserve.fleet import fleet as module
from jaxserve.fleet.health import Patience
from jaxserve.fleet.instance import Said
from jaxserve.parallel.errors import QueueFullError, RequestError
from jaxserve.request import Output
from tests.jaxserve.fleet.fakes import Clock, Fake, asked, make_fleet, prompt_logprobs, said


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(module, "BRIEF", 0)


class Stage:
    """A fleet of fakes, and what it has said."""

    def __init__(self, **options):
        self.clock, self.offers = Clock(), set[str]()
        self.fleet = make_fleet(self.clock, **options)
        self.fakes: list[Fake] = []
        self.heard: dict[tuple[str, int], list[Output]] = {}

    def join(self, name, role, **other) -> Fake:
        fake = Fake(name, role, self.offers, self.clock, **other)
        self.fleet.join(fake)
        self.fakes.append(fake)
        return fake

    def pair(self) -> tuple[Fake, Fake]:
        return self.join("P1", "prefill"), self.join("D1", "decode")

    def step(self) -> list[Output]:
        outputs = self.fleet.step()
        for output in outputs:
            self.heard.setdefault((output.request_id, output.index), []).append(output)
        return outputs

    def run(self, turns: int = 100) -> None:
        """Lets all instances work until everything is answered."""
        for _ in range(turns):
            if not self.fleet.busy:
                return
            for fake in self.fakes:
                fake.work()
            self.step()
        raise AssertionError("it does not end")

    def tokens(self, id: str, index: int = 0) -> tuple[int, ...]:
        return tuple(token for output in self.heard.get((id, index), []) for token in output.token_ids)

    def last(self, id: str, index: int = 0) -> Output:
        return self.heard[id, index][-1]


# -- the undisturbed way --


def test_a_prompt_is_computed_at_one_instance_and_answered_at_another():
    stage = Stage()
    prefill, decode = stage.pair()
    stage.fleet.add(asked("x", (5, 7), seed=3))
    stage.run()
    assert stage.tokens("x") == said((5, 7), 3, 4)
    assert (len(prefill.given), len(decode.given)) == (1, 1)
    assert decode.given[0].handover and not stage.offers
    assert not stage.fleet.busy and stage.last("x").finish_reason == "length"


def test_each_of_several_answers_has_a_seed_of_its_own_that_goes_round_at_the_largest():
    stage = Stage()
    stage.pair()
    stage.fleet.add(asked("x", (5, 7), n=3, seed=2**32 - 1))
    stage.run()
    assert [stage.tokens("x", index) for index in range(3)] == [said((5, 7), seed, 4) for seed in (2**32 - 1, 0, 1)]


def test_a_request_without_a_seed_gets_one_that_goes_with_it():
    stage = Stage()
    _, decode = stage.pair()
    stage.fleet.add(asked("x", (5,)))
    stage.run()
    assert stage.tokens("x") == said((5,), decode.given[0].params.seed, 4)


def test_without_an_instance_for_prompts_the_others_do_all():
    stage = Stage()
    decode = stage.join("D1", "decode")
    stage.fleet.add(asked("x", (5, 7), seed=3, prompt_logprobs=0))
    stage.run()
    assert stage.tokens("x") == said((5, 7), 3, 4)
    assert decode.given[0].handover is None
    assert stage.heard["x", 0][0].prompt_logprobs == prompt_logprobs((5, 7))


def test_what_was_found_with_the_prompt_comes_with_the_first_output_of_the_first_answer():
    stage = Stage()
    prefill, decode = stage.pair()
    stage.fleet.add(asked("x", (5, 7), n=2, seed=3, prompt_logprobs=0))
    stage.clock.now += 1.0
    stage.run()
    first, *others = stage.heard["x", 0]
    assert first.prompt_logprobs == prompt_logprobs((5, 7))
    assert (first.num_cached_tokens, first.queue_seconds) == (1, 0.5)
    assert all((o.prompt_logprobs, o.num_cached_tokens, o.queue_seconds) == (None, 0, 0.0) for o in others)
    assert stage.heard["x", 1][0].prompt_logprobs is None
    assert [request.params.prompt_logprobs for request in prefill.given] == [0, None]
    assert [request.params.prompt_logprobs for request in decode.given] == [None, None]


def test_of_those_that_wait_the_most_urgent_goes_first():
    stage = Stage(ahead=0.0)
    decode = stage.join("D1", "decode", slots=1)
    for id, priority in (("a", 0), ("b", 1), ("c", 0), ("d", -1)):
        request = asked(id, (5,), 1, seed=1)
        stage.fleet.add(type(request)(request.id, request.prompt_token_ids, request.params, priority=priority))
    seeds = []
    while stage.fleet.busy:
        decode.work()
        seeds += [output.request_id for output in stage.step()]
    assert seeds == ["a", "d", "c", "b"]


def test_jobs_run_ahead_of_an_instance_only_so_far():
    stage = Stage(ahead=0.5)
    prefill, _ = stage.join("P1", "prefill"), stage.join("D1", "decode", slots=4)
    for i in range(20):
        stage.fleet.add(asked(str(i), (5,), 1, seed=i))
    assert (len(prefill.tasks), stage.fleet.stages()["waiting"]) == (6, 14)
    stage.run()
    assert all(stage.tokens(str(i)) == said((5,), i, 1) for i in range(20))


def test_room_is_kept_for_jobs_that_are_on_their_way():
    stage = Stage()
    stage.join("P1", "prefill")
    one, two = stage.join("D1", "decode"), stage.join("D2", "decode")
    stage.fleet.add(asked("long", range(50), seed=1))
    stage.fleet.add(asked("short", (5,), seed=1))
    stage.fleet.add(asked("other", (5,), seed=1))
    stage.fakes[0].work()
    stage.step()
    assert [len(each.given[0].prompt_token_ids) for each in (one, two)] == [50, 1]
    assert [len(each.tasks) for each in (one, two)] == [1, 2]


# -- what can't be served --


def test_what_can_not_be_served_is_refused_as_an_engine_refuses_it():
    fleet = Stage().fleet
    with pytest.raises(RequestError, match="prompt has 128 tokens; this engine accepts 127"):
        fleet.add(asked("x", [5] * 128))
    with pytest.raises(RequestError, match="stop_token_ids has 97; the model's tokens are 0 to 96"):
        fleet.check(asked("x", (5,), stop_token_ids=[97]))
    fleet.add(asked("x", (5,)))
    with pytest.raises(RequestError, match="request id 'x' is taken"):
        fleet.add(asked("x", (5,)))


def test_the_queue_has_an_end():
    stage = Stage(max_num_queued=2)
    stage.join("D1", "decode", slots=1)
    stage.fleet.add(asked("x", (5,), n=3))
    with pytest.raises(QueueFullError, match="3 answers are open, of 2 that may wait besides 1 that can run; 1 needed"):
        stage.fleet.add(asked("y", (5,)))
    stage.run()
    stage.fleet.add(asked("y", (5,)))


def test_what_an_instance_refuses_ends_with_its_reason():
    stage = Stage()
    _, decode = stage.pair()
    stage.fleet.add(asked("x", (5,)))
    stage.fakes[0].work()
    stage.step()
    decode.refuse(next(iter(decode.tasks)))
    stage.step()
    assert stage.last("x").error == "D1 refuses it: not so" and not stage.fleet.busy


# -- faults --


def test_an_answer_goes_on_elsewhere_after_what_the_client_has_been_told():
    stage = Stage()
    stage.pair()
    stage.fleet.add(asked("x", (5, 7), 6, seed=3, prompt_logprobs=0))
    for _ in range(3):
        for fake in stage.fakes:
            fake.work()
        stage.step()
    told = stage.tokens("x")
    assert 0 < len(told) < 6
    stage.fakes.pop().die()
    another = stage.join("D2", "decode")
    stage.run()
    assert another.given[0].answered == told and another.given[0].handover
    assert stage.tokens("x") == said((5, 7), 3, 6)
    assert [o.prompt_logprobs is not None for o in stage.heard["x", 0]] == [True] + [False] * 5
    assert stage.fleet.tally.lost == {"gone": 1} and stage.fleet.tally.recovery.count == 1


def test_a_prompt_whose_instance_is_gone_is_computed_at_another_one():
    stage = Stage()
    stage.pair()
    stage.fleet.add(asked("x", (5, 7), seed=3))
    other = stage.join("P2", "prefill")
    stage.fakes.pop(0).die()
    stage.run()
    assert stage.tokens("x") == said((5, 7), 3, 4) and len(other.given) == 1


def test_pages_that_do_not_come_are_computed_again():
    stage = Stage()
    prefill, _ = stage.pair()
    stage.fleet.add(asked("x", (5, 7), seed=3))
    prefill.work()
    stage.offers.clear()
    stage.run()
    assert stage.tokens("x") == said((5, 7), 3, 4)
    assert len(prefill.given) == 1 and stage.fleet.tally.retries == 1


def test_where_pages_did_not_come_from_they_are_not_computed_again_if_there_are_others():
    stage = Stage()
    stage.pair()
    other = stage.join("P2", "prefill")
    stage.fleet.add(asked("x", (5, 7), seed=3))
    stage.fakes[0].work()
    stage.step()
    pages_are_lost(stage)
    stage.run()
    assert stage.tokens("x") == said((5, 7), 3, 4) and len(other.given) == 1


def lose_pages(stage, decode, id="x"):
    """A job is given, and its pages do not come."""
    stage.fleet.add(asked(id, (5, 7), seed=3))
    for fake in stage.fakes:
        if fake.about.role == "prefill":
            fake.work()
    stage.step()
    stage.offers.clear()
    decode.work()
    stage.step()


def test_a_link_on_which_pages_did_not_come_is_avoided_for_a_while():
    stage = Stage(doubt=60.0)
    one, decode = stage.pair()
    other = stage.join("P2", "prefill")
    lose_pages(stage, decode)
    stage.run()
    asked_before = len(one.given)
    for i in range(3):
        stage.fleet.add(asked(str(i), (5, 7), seed=i))
        stage.run()
    assert len(one.given) == asked_before and len(other.given) == 4
    stage.clock.now += 60.0
    stage.fleet.add(asked("later", (5, 7), seed=3))
    stage.run()
    assert len(one.given) == asked_before + 1


def test_an_answer_goes_where_pages_come_to_though_more_is_done_there():
    stage = Stage()
    _, decode = stage.pair()
    lose_pages(stage, decode)
    other = stage.join("D2", "decode")
    other.pages = 32
    stage.fleet.add(asked("y", (5, 7), seed=3))
    stage.run()
    assert len(other.given) == 1 and stage.tokens("y") == said((5, 7), 3, 4)


def test_where_all_links_are_in_doubt_prompts_are_computed_with_their_answers():
    stage = Stage(doubt=60.0)
    prefill, decode = stage.pair()
    lose_pages(stage, decode)
    stage.run()
    assert stage.tokens("x") == said((5, 7), 3, 4) and len(prefill.given) == 1
    stage.clock.now += 60.0
    stage.fleet.add(asked("later", (5, 7), seed=3))
    stage.run()
    assert len(prefill.given) == 2 and not stage.fleet._missed  # its pages have come
    assert stage.fleet.tally.missed == {("P1", "D1"): 1}


def test_an_instance_that_has_come_back_is_not_in_doubt():
    stage = Stage()
    prefill, decode = stage.pair()
    lose_pages(stage, decode)
    prefill.die()
    stage.step()
    stage.join("P1", "prefill")
    assert not stage.fleet._missed


def test_nobody_waits_for_pages_that_lie_at_an_instance_that_is_lost():
    stage = Stage()
    prefill, decode = stage.pair()
    other = stage.join("P2", "prefill")
    stage.fleet.add(asked("x", (5, 7), seed=3))
    prefill.work()
    stage.step()
    assert len(decode.tasks) == 1
    prefill.die()
    stage.step()
    assert not decode.tasks and len(other.tasks) == 1
    stage.run()
    assert stage.tokens("x") == said((5, 7), 3, 4) and stage.fleet.tally.retries == 1


def test_nobody_is_sent_to_fetch_pages_of_an_instance_that_was_lost_while_jobs_waited():
    stage = Stage()
    prefill, decode = stage.pair()
    stage.fleet.add(asked("x", (5, 7), seed=3))
    decode.die()
    prefill.work()
    stage.step()
    prefill.die()
    stage.step()
    other = stage.join("D2", "decode")
    stage.run()
    assert stage.tokens("x") == said((5, 7), 3, 4)
    assert [request.handover for request in other.given] == [None]


def test_who_has_taken_pages_of_an_instance_that_leaves_goes_on():
    stage = Stage()
    prefill, decode = stage.pair()
    stage.fleet.add(asked("x", (5, 7), seed=3))
    prefill.work()
    stage.step()
    (task,) = decode.tasks
    decode.places[task] = 0  # it has the pages, and has said nothing yet
    prefill.draining = True
    prefill.die()
    stage.run()
    assert stage.tokens("x") == said((5, 7), 3, 4) and stage.fleet.tally.retries == 0
    assert not stage.fleet.tally.lost and stage.fleet.tally.detection.count == 0


def test_that_nobody_generates_answers_any_more_is_logged(caplog):
    stage = Stage()
    one, two = stage.join("D1", "decode"), stage.join("D2", "decode")
    one.die()
    assert "there is no instance that generates answers" not in caplog.text
    two.die()
    assert "there is no instance that generates answers" in caplog.text


def test_text_that_was_held_back_when_a_step_failed_is_not_told_twice():
    stage = Stage()
    _, decode = stage.pair()
    stage.fleet.add(asked("x", (5, 7), seed=3))
    stage.fakes[0].work()
    stage.step()
    decode.work()
    decode.fail()
    stage.run()
    assert stage.tokens("x") == said((5, 7), 3, 4)
    assert "held" not in "".join(output.text for output in stage.heard["x", 0])


def test_a_job_that_fails_too_often_ends_with_the_last_cause():
    stage = Stage(attempts=3)
    prefill, _ = stage.pair()
    stage.fleet.add(asked("x", (5, 7)))
    for _ in range(3):
        prefill.fail()
        stage.step()
    assert stage.last("x").error == "given up after 3 attempts; at the last, P1: a step failed"
    assert not stage.fleet.busy


def test_what_a_lost_instance_still_says_is_not_heard():
    stage = Stage()
    decode = stage.join("D1", "decode")
    stage.fleet.add(asked("x", (5, 7), seed=3))
    decode.die()
    decode.work()
    stage.join("D2", "decode")
    stage.fakes = stage.fakes[1:]
    stage.run()
    assert stage.tokens("x") == said((5, 7), 3, 4)


def test_an_instance_that_is_silent_or_hangs_is_lost_and_one_that_is_slow_is_kept():
    stage = Stage(patience=Patience(slow_after=1, hung_after=10, dead_after=5))
    silent, hung = stage.join("D1", "decode"), stage.join("D2", "decode")
    slow = stage.join("D3", "decode")
    for i in range(3):
        stage.fleet.add(asked(str(i), (5,), seed=i))
    silent.silent = True
    for second in range(12):
        stage.clock.now += 1
        slow.beat += second % 3 == 0
        stage.step()
        states = {name: state for name, (_, state) in stage.fleet.members.states().items()}
        assert ("D1" in states, "D2" in states, states["D3"] in ("healthy", "slow")) == (second < 5, second < 10, True)
    assert silent.closed and hung.closed and stage.fleet.tally.lost == {"dead": 1, "hung": 1}
    assert 15 <= stage.fleet.tally.detection.seconds + 10 and not slow.closed
    stage.fakes = [slow]
    stage.run()
    assert all(stage.tokens(str(i)) == said((5,), i, 4) for i in range(3))


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_one_that_is_silent_or_slow_gets_something_only_if_nobody_else_can_have_it(role):
    stage = Stage(patience=Patience(slow_after=1, dead_after=10))
    stage.join("D", "decode")
    first, second = stage.join("A", role), stage.join("B", role)
    if role == "decode":
        stage.fakes.pop(0).draining = True
    first.silent = True
    stage.clock.now += 6
    for i in range(3):
        stage.fleet.add(asked(str(i), (5,), seed=i))
    assert (len(first.given), len(second.given)) == (0, 3)
    first.silent = False
    stage.clock.now += 2  # in which the second has made no step, though it has work
    stage.fleet.add(asked("3", (5,), seed=3))
    assert (len(first.given), len(second.given)) == (1, 3)
    second.die()
    stage.step()
    first.silent = True
    stage.clock.now += 6
    stage.fleet.add(asked("4", (5,), seed=4))
    assert len(first.given) == 5
    first.silent = False
    stage.run()
    assert all(stage.tokens(str(i)) == said((5,), i, 4) for i in range(5))


def test_an_instance_that_drains_finishes_and_gets_nothing_more():
    stage = Stage()
    one, two = stage.join("D1", "decode"), stage.join("D2", "decode")
    stage.fleet.add(asked("x", (5,), seed=1))
    one.draining = True
    for i in range(5):
        stage.fleet.add(asked(str(i), (5,), seed=i))
    assert (len(one.given), len(two.given)) == (1, 5)
    assert stage.fleet.members.states()["D1"] == ("decode", "draining")
    stage.run()
    assert stage.tokens("x") == said((5,), 1, 4)


def test_jobs_wait_for_an_instance_to_come_but_not_for_ever():
    stage = Stage(wait=30)
    stage.fleet.add(asked("x", (5,), seed=1))
    stage.clock.now += 29
    assert stage.step() == [] and stage.fleet.busy and not stage.fleet.ready
    decode = stage.join("D1", "decode")
    assert stage.fleet.ready
    decode.die()
    stage.step()
    stage.clock.now += 29
    assert stage.step() == []
    stage.clock.now += 2
    stage.step()
    assert stage.last("x").error == "no decode instance has come within 30 s; start one"


def test_an_aborted_request_is_taken_back_from_everybody():
    stage = Stage()
    prefill, decode = stage.pair()
    stage.fleet.add(asked("x", (5,), n=2))
    prefill.go_on(next(iter(prefill.tasks)))
    stage.step()
    assert (len(prefill.tasks), len(decode.tasks)) == (1, 1)
    stage.fleet.abort("x")
    stage.fleet.abort("never asked")
    assert not prefill.tasks and not decode.tasks and not stage.fleet.busy
    assert not stage.offers


def pages_are_lost(stage: Stage) -> None:
    decode = stage.fakes[1]
    (task,) = decode.tasks
    del decode.tasks[task]
    decode.hear(Said([Output(task, finish_reason="error", error="no page came in time", lost=True)]))


ENDS = {
    "aborted": lambda stage: stage.fleet.abort("x"),
    "its decode instance is gone": lambda stage: stage.fakes[1].die(),
    "its decode instance fails": lambda stage: stage.fakes[1].fail(),
    "its decode instance refuses it": lambda stage: stage.fakes[1].refuse(next(iter(stage.fakes[1].tasks))),
    "its pages are lost": pages_are_lost,
    "the router fails": lambda stage: stage.fleet.recover(),
}


@pytest.mark.parametrize("attempts", [1, 5])
@pytest.mark.parametrize("end", ENDS)
def test_pages_that_nobody_will_fetch_are_withdrawn(end, attempts):
    stage = Stage(attempts=attempts)
    prefill, decode = stage.pair()
    stage.fleet.add(asked("x", (5,)))
    prefill.work()
    stage.step()
    assert len(stage.offers) == len(decode.tasks) == 1
    ENDS[end](stage)
    stage.step()
    assert not stage.offers


def test_pages_of_an_answer_that_waits_for_a_decode_instance_are_withdrawn_with_it():
    stage = Stage(wait=30)
    prefill, decode = stage.pair()
    stage.fleet.add(asked("x", (5,), n=2))
    decode.draining = True
    prefill.work()
    stage.step()
    assert len(stage.offers) == 2 and stage.fleet.stages() == {"waiting": 2}
    stage.step()
    stage.clock.now += 31
    stage.step()
    assert stage.last("x").error and not stage.fleet.busy and not stage.offers


def test_a_router_that_fails_in_a_step_ends_all_and_goes_on(monkeypatch):
    stage = Stage()
    decode = stage.join("D1", "decode")
    stage.fleet.add(asked("x", (5,), n=2))
    assert [(o.index, o.finish_reason) for o in stage.fleet.recover()] == [(0, "error"), (1, "error")]
    assert not decode.tasks and not stage.fleet.busy
    stage.fleet.add(asked("x", (5,), seed=1))
    stage.run()
    assert stage.tokens("x") == said((5,), 1, 4)


# -- who may join --


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"max_model_len": 64}, "max_model_len = 64: the router's is 128"),
        ({"identity": {"config": "0"}}, "config = '0': the router has "),
        ({"identity": {"mtp_layers": 0}}, "mtp_layers = 0: D1 has 1; all must have the same"),
        ({"identity": {"weights": "1"}}, "weights = '1': D1 has '00'; all must have the same"),
        ({"identity": {"dtype": "bfloat16"}}, "dtype = 'bfloat16': D1 has 'float32'"),
        ({"identity": {"kv_cache_dtype": "int8"}}, "kv_cache_dtype = 'int8': D1 has 'auto'"),
        ({"identity": {"weights": "1", "dtype": "bfloat16"}}, "dtype = 'bfloat16': D1 has 'float32'"),
        ({"identity": {"page_size": 8}}, "page_size = 8: D1 has 16"),
    ],
)
def test_an_instance_that_does_not_fit_is_told_the_field(other, message):
    stage = Stage()
    first = stage.join("D1", "decode")
    if "identity" in other:
        other = {"identity": first.about.identity._replace(**other["identity"])}
    with pytest.raises(RequestError, match=re.escape(message)):
        stage.join("P1", "prefill", **other)
    assert list(stage.fleet.members.states()) == ["D1"]


def test_a_name_is_free_again_when_its_instance_is_lost_though_nothing_is_asked():
    stage = Stage(patience=Patience(dead_after=5))
    first = stage.join("D1", "decode")
    with pytest.raises(RequestError, match="name: there is an instance 'D1' already"):
        stage.join("D1", "decode")
    first.die()
    second = stage.join("D1", "decode")
    second.silent = True
    stage.clock.now += 6
    stage.join("D1", "decode")


def test_what_the_fleet_counts_is_what_clients_got_and_the_sum_of_what_instances_say():
    stage = Stage()
    _, decode = stage.pair()
    stage.fleet.add(asked("x", (5, 7), n=2))
    assert (stage.fleet.counters.waiting, stage.fleet.counters.running) == (0, 2)
    stage.run()
    decode.die()
    c = stage.fleet.counters
    assert (c.prompt_tokens, c.cached_tokens, c.generated_tokens) == (4, 2, 8)
    assert (c.pages, c.slots, c.page_size, c.running) == (64, 4, 16, 0)
    assert stage.fleet.memory == (1, 2)


# -- everything at once --


class Storm(RuleBasedStateMachine):
    """Whatever happens to instances, each answer is complete, in order and told once, or ends with an error."""

    def __init__(self):
        super().__init__()
        self.stage = Stage(attempts=4, wait=1000, patience=Patience(hung_after=50, dead_after=20))
        self.requests, self.aborted, self.names = {}, set(), 0

    @rule(role=st.sampled_from(["prefill", "decode"]), slots=st.integers(1, 3))
    def join(self, role, slots):
        self.names += 1
        self.stage.join(f"{role}{self.names}", role, slots=slots)

    @rule(count=st.integers(1, 6), n=st.integers(1, 3), known=st.booleans(), urgent=st.integers(-1, 1))
    def ask(self, count, n, known, urgent):
        id, prompt = str(len(self.requests)), tuple(range(len(self.requests) % 7 + 1))
        request = asked(id, prompt, count, n=n, seed=5, prompt_logprobs=0 if known else None)
        self.requests[id] = request
        self.stage.fleet.add(type(request)(id, prompt, request.params, priority=urgent))

    @precondition(lambda self: self.stage.fakes)
    @rule(data=st.data(), count=st.integers(1, 3))
    def work(self, data, count):
        fake = data.draw(st.sampled_from(self.stage.fakes))
        if fake.tasks:
            fake.go_on(data.draw(st.sampled_from(sorted(fake.tasks))), count)

    @precondition(lambda self: self.stage.fakes)
    @rule(data=st.data(), how=st.sampled_from(["die", "fail", "drain", "silent"]))
    def harm(self, data, how):
        fake = data.draw(st.sampled_from(self.stage.fakes))
        if how == "drain":
            fake.draining = True
        elif how == "silent":
            fake.silent = True
        else:
            getattr(fake, how)()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        id = data.draw(st.sampled_from(sorted(self.requests)))
        self.stage.fleet.abort(id)
        self.aborted.add(id)

    @rule()
    def lose_pages(self):
        self.stage.offers.clear()

    @rule(seconds=st.integers(1, 30))
    def time_passes(self, seconds):
        self.stage.clock.now += seconds

    @rule()
    def step(self):
        self.stage.step()

    @invariant()
    def each_answer_is_a_beginning_and_ends_once(self):
        for (id, index), outputs in self.stage.heard.items():
            request = self.requests[id]
            answer = said(request.prompt_token_ids, 5 + index, request.params.max_tokens)
            assert self.stage.tokens(id, index) == answer[: len(self.stage.tokens(id, index))]
            assert all(output.finish_reason is None for output in outputs[:-1])
            told = [output.prompt_logprobs is not None for output in outputs]
            assert not any(told[1:])
            wanted = request.params.prompt_logprobs is not None and index == 0
            assert told[0] == wanted or outputs[0].finish_reason == "error"

    def teardown(self):
        """With one of each that is well, all that is open is answered."""
        stage = self.stage
        stage.join("P", "prefill")
        stage.join("D", "decode")
        stage.run(500)
        for id, request in self.requests.items():
            for index in range(request.params.n):
                if id in self.aborted:
                    continue
                last = stage.last(id, index)
                complete = stage.tokens(id, index) == said(
                    request.prompt_token_ids, 5 + index, request.params.max_tokens
                )
                assert (last.finish_reason == "length" and complete) or "given up after 4 attempts" in last.error
        assert not stage.fleet._tasks and not stage.fleet._jobs and not stage.offers


TestStorm = Storm.TestCase
TestStorm.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
