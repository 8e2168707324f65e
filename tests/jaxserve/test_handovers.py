"""One engine goes on with what another has computed: no token changes, wherever that was."""

from dataclasses import replace
from typing import Any

import pytest

from jaxserve.connector import Connector
from jaxserve.parallel.errors import RequestError
from jaxserve.programs import Shapes, Tiles
from jaxserve.request import Handover, Output, Request, SamplingParams, StructuredOutputs
from tests.jaxserve.conftest import tokens
from tests.jaxserve.connected import (
    ASKED,
    FORMS,
    GREEDY,
    NAMES,
    PAGE,
    SEEDED,
    answers,
    check_answers,
    connected,
    connector_of,
    exported,
    forget,
    handed_over,
    of_form,
    requests,
    run,
)
from tests.jaxserve.test_product import prompts
from tests.processes import free_ports

SINGLE = Tiles(1, 1), Tiles(4, 1)


@pytest.mark.slow
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("decoding", [1, 2, 4])
@pytest.mark.parametrize("prefilling", [1, 2, 4])
@pytest.mark.parametrize(("drafts", "int8"), FORMS)
def test_an_engine_answers_what_another_has_read_as_if_it_had_itself(drafts, int8, prefilling, decoding, params):
    first, second = (connected("short", drafts, ranks, int8) for ranks in (prefilling, decoding))
    found = handed_over(first, second, requests("short", params))
    check_answers(found, params, drafts, int8, prefilling, decoding)


@pytest.mark.parametrize(("drafts", "int8"), [of_form(0, False), of_form(1, False)])
def test_few_tokens_that_are_left_of_a_prompt_are_tiles_of_their_own(drafts, int8, monkeypatch):
    engine, used, choose = connected("short", drafts, int8=int8), list[Tiles](), Shapes.for_chunks
    request, prompt = requests("short", GREEDY)[-1], prompts("short")[-1]

    def ask(left: int) -> list[int]:
        asked = replace(request, id=str(next(NAMES)), prompt_token_ids=prompt[: 2 * PAGE + left])
        return answers(engine, [asked])[0]

    wanted = [(forget(engine), ask(left))[1] for left in (1, 1, 2, 4)]
    forget(engine)
    monkeypatch.setattr(Shapes, "for_chunks", lambda *given: used.append(choose(*given)) or used[-1])
    monkeypatch.setattr(engine, "_shapes", engine._shapes._replace(prefill=(*SINGLE, *engine._shapes.prefill)))
    assert [ask(left) for left in (1, 1, 2, 4)] == wanted
    assert used[1:] == [SINGLE[0], SINGLE[1], SINGLE[1]]


KINDS_OF_ANSWERS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8, "seed": 7},
    "penalized": {"temperature": 0.7, "seed": 3, "repetition_penalty": 1.3, "presence_penalty": 0.5, "min_tokens": 12},
    "biased": {"temperature": 0.0, "logit_bias": {97: 5.0, 100: -100.0}, "bad_words": ["return"]},
    "scored": {"temperature": 0.0, "logprobs": 3},
    "formed": {"temperature": 0.9, "seed": 5, "structured_outputs": StructuredOutputs(regex=r"[a-z]{3} = \d{12}")},
    "stopped": {"temperature": 0.0, "stop": ["\n\n", "self."], "include_stop_str_in_output": True},
}


@pytest.mark.parametrize("handed", [False, True], ids=["computed", "handed over"])
@pytest.mark.parametrize("kind", KINDS_OF_ANSWERS)
def test_an_answer_that_was_begun_goes_on_as_it_would_have(kind, handed):
    engine = connected("short")
    params = SamplingParams(max_tokens=14, **KINDS_OF_ANSWERS[kind])
    (whole,) = run(engine, [Request(str(next(NAMES)), prompts("short")[-1], params)])
    said, text = tokens(whole), "".join(each.text for each in whole)
    for count in range(1, len(said)):
        request = Request(str(next(NAMES)), prompts("short")[-1], params, answered=tuple(said[:count]))
        if handed:
            forget(engine)
            request = replace(request, handover=exported(engine, [request])[0])
        (rest,) = run(engine, [request])
        assert tokens(rest) == said[count:]
        assert text.endswith("".join(each.text for each in rest))
        assert (rest[-1].finish_reason, rest[-1].stop_reason) == (whole[-1].finish_reason, whole[-1].stop_reason)
        for found, wanted in zip(scores(rest), scores(whole)[count:], strict=True):
            assert found == pytest.approx(wanted, abs=1e-4)


def scores(outputs: list[Output]) -> list[dict[int, float]]:
    """Log-probabilities at each place of an answer."""
    places = (place for output in outputs for place in output.logprobs)
    return [{token: found.logprob for token, found in place.items()} for place in places]


def test_a_prompt_s_scores_come_with_its_pages_and_not_from_them():
    engine = connected("short")
    forget(engine)
    prompt = prompts("short")[-1]
    (wanted,) = run(engine, [Request(str(next(NAMES)), prompt, replace(ASKED, prompt_logprobs=1))])
    asked = Request(str(next(NAMES)), prompt, replace(ASKED, prompt_logprobs=1), export=True)
    (found,) = run(engine, [asked])
    assert found[-1].handover is not None and found[-1].handover.tokens == len(prompt)
    assert found[-1].prompt_logprobs == wanted[-1].prompt_logprobs


def test_pages_that_are_gone_end_the_answer_and_nothing_else():
    engine = connected("short")
    asked = requests("short", GREEDY)[-3:]
    forget(engine)
    offered = exported(engine, asked)
    exports = connector_of(engine)._exports
    assert exports is not None
    exports.sender.withdraw(offered[1].name)
    outputs = run(engine, [replace(each, handover=where) for each, where in zip(asked, offered, strict=True)])
    assert [(each[-1].finish_reason, each[-1].lost) for each in outputs] == [
        ("length", False), ("error", True), ("length", False)
    ]  # fmt: skip
    assert "is not offered" in (outputs[1][-1].error or "")
    (alone,) = run(engine, [asked[1]])
    assert alone[-1].finish_reason == "length"


def test_an_engine_that_is_not_there_any_more_is_noticed():
    engine = connected("short")
    (request,) = requests("short", GREEDY)[-1:]
    (port,) = free_ports(1)
    (outputs,) = run(engine, [replace(request, handover=Handover("127.0.0.1", port, "it", 80))])
    assert outputs[-1].lost and "does not answer" in (outputs[-1].error or "")


def test_prompts_wait_until_there_is_room_for_their_pages():
    """And go on in their order."""
    engine = connected("short")
    connector, asked = connector_of(engine), requests("short", GREEDY)[-4:]
    forget(engine)
    assert connector._exports is not None
    connector.withdraw()
    offers, most = connector._exports.sender.offers, 6 * connector.layout.page_bytes
    limit, offers.limit = offers.limit, most
    try:
        wanted = [replace(each, params=ASKED, export=True) for each in asked]
        for request in wanted:
            engine.add(request)
        found: dict[str, Handover] = {}
        for _ in range(200):
            said = [output for output in engine.step() if output.handover]
            found |= {output.request_id: output.handover for output in said if output.handover}
        assert list(found) == [wanted[0].id]
        assert offers.nbytes <= most
        for count in range(1, 4):
            engine.add(replace(asked[count - 1], handover=found[wanted[count - 1].id]))
            while len(found) <= count:
                said = [output for output in engine.step() if output.handover]
                found |= {output.request_id: output.handover for output in said if output.handover}
        assert list(found) == [each.id for each in wanted]
    finally:
        offers.limit = limit
        while engine.busy:
            engine.step()
    assert connector.offered == 1


class AtOnce:
    """A queue whose entries are taken while they are put into it."""

    def __init__(self, connector: Connector):
        self._connector = connector

    def put(self, leaving: Any) -> None:
        self._connector._take(leaving)


def test_pages_that_leave_at_once_are_said_once(monkeypatch):
    engine = connected("short")
    connector = connector_of(engine)
    monkeypatch.setattr(connector, "_leaving", AtOnce(connector))
    (outputs,) = run(engine, [replace(requests("short", ASKED)[-1], export=True)])
    assert len(outputs) == 1 and outputs[0].handover is not None


def test_who_goes_away_while_pages_come_or_leave_leaves_nothing_behind():
    engine = connected("short")
    connector, (request,) = connector_of(engine), requests("short", GREEDY)[-1:]
    before = connector.offered
    for steps in range(6):
        leaving = replace(request, id=f"leaving {steps}", params=ASKED, export=True)
        engine.add(leaving)
        for _ in range(steps):
            engine.step()
        engine.abort(leaving.id)
        (where,) = exported(engine, [request])
        coming = replace(request, id=f"coming {steps}", handover=where)
        engine.add(coming)
        for _ in range(steps):
            engine.step()
        engine.abort(coming.id)
        engine.abort(where.name.rpartition("/")[0])  # whose pages these are, in case they were not fetched
        while engine.busy:
            engine.step()
    exports = connector._exports
    assert exports is not None and not exports._reserved
    assert not connector._promised and not engine._schedulers.expecting()
    assert connector.offered == before


REFUSED = {
    "cache_salt = 5: it must be a text": {"cache_salt": 5},
    "cache_salt = '.udc80': it must be a text": {"cache_salt": "\udc80"},
    "export: .*n or max_tokens is not 1": {"export": True},
    "handover: .*or prompt_logprobs are asked for": {
        "handover": Handover("127.0.0.1", 1, "it", 3), "params": replace(GREEDY, prompt_logprobs=1)
    },
    "answered: it goes with n = 1": {"answered": (3,), "params": replace(SEEDED, n=2)},
    "answered has 900; the model's tokens are": {"answered": (900,)},
    "prompt and answered have 140 tokens; 127 are accepted": {"answered": (3,) * 60},
    "answered has 14 tokens after which the answer is complete": {"answered": (3,) * 14},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_engines_may_not_ask_of_each_other_is_refused(message):
    engine = connected("deepseek_v3")
    request = Request("it", tuple(range(2, 82)), GREEDY)
    with pytest.raises(RequestError, match=message):
        engine.add(replace(request, **REFUSED[message]))
    assert not engine.busy
