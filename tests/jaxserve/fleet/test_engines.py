"""Engines of the embedded model as a fleet in one process: its answers are those of one engine alone."""

from dataclasses import replace

import pytest

from jaxserve.fleet.instance import Gone
from jaxserve.request import Request, SamplingParams, StructuredOutputs
from tests.jaxserve.conftest import loaded
from tests.jaxserve.fleet.conftest import end, listen, make_fleet
from tests.parallel.test_transfer import stalling, wire
from tests.waiting import eventually

pytestmark = pytest.mark.xdist_group("embedded")  # compiled in one process

PROMPTS = "def quicksort(items):", "import os\nimport", "class Node:\n    def __init__(self, value, next=None):\n"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
WAYS = {
    "greedy": SamplingParams(temperature=0, max_tokens=24),
    "seeded": SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=24),
    "several": SamplingParams(temperature=1.0, n=3, seed=2**32 - 2, max_tokens=16),
    "logprobs": SamplingParams(temperature=0.5, seed=1, logprobs=3, prompt_logprobs=2, max_tokens=12),
    "structured": SamplingParams(
        temperature=0.7, seed=5, max_tokens=40, structured_outputs=StructuredOutputs(json=SCHEMA)
    ),
    "stop": SamplingParams(temperature=0, stop=["\n    ", "self"], max_tokens=40, include_stop_str_in_output=True),
    "penalties": SamplingParams(
        temperature=0.6, seed=9, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, max_tokens=24
    ),
    "narrow": SamplingParams(temperature=1.0, seed=3, min_p=0.05, bad_words=["return"], min_tokens=8, max_tokens=24),
}


def requests() -> list[Request]:
    tokenizer = loaded("embedded")[2]
    return [
        Request(f"{way}-{number}", tuple(tokenizer.encode(prompt)), params)
        for way, params in WAYS.items()
        for number, prompt in enumerate(PROMPTS)
    ]


def results(heard):
    return {key: each.result() for key, each in heard.items()}


def same(heard, expected):
    """Whether all was said that one engine says alone; scores differ by rounding."""
    assert heard.keys() == expected.keys()
    for key, each in results(heard).items():
        tokens, text, logprobs, known, *end = each
        want_tokens, want_text, want_logprobs, want_known, *want_end = results(expected)[key]
        assert (tokens, text, end) == (want_tokens, want_text, want_end), key
        assert [list(each) for each in logprobs] == [list(each) for each in want_logprobs]
        for found, want in ((logprobs, want_logprobs), (known or (), want_known or ())):
            for one, other in zip(found, want, strict=True):
                values = [] if one is None else [(one[token].logprob, other[token].logprob) for token in one]
                assert all(a == pytest.approx(b, abs=1e-3) for a, b in values)


@pytest.fixture(scope="module")
def expected(engines):
    for request in requests():
        engines["alone"].add(request)
    return listen(engines["alone"])


def connector(engines, name):
    return engines[name]._porter._connector


def sender(engines, name="P1"):
    return connector(engines, name)._exports.sender


@pytest.mark.parametrize("names", [["D1"], ["P1", "D1"], ["P1", "D1", "D2"]])
def test_a_fleet_answers_as_one_engine_does(engines, expected, names):
    pulls = sum(counts.pulls for counts in sender(engines).counts.values())
    fleet, locals = make_fleet(engines, *names)
    for request in requests():
        fleet.add(request)
    heard = listen(fleet)
    same(heard, expected)
    pulls = sum(counts.pulls for counts in sender(engines).counts.values()) - pulls
    assert pulls == (len(expected) if "P1" in names else 0)  # one for each answer
    end(engines, locals)


def test_a_decode_instance_that_is_lost_in_the_middle_changes_no_answer(engines, expected):
    fleet, locals = make_fleet(engines, "P1", "D1", "D2")
    for request in requests():
        fleet.add(request)
    heard = listen(fleet, until=lambda heard: sum(len(each.tokens) for each in heard.values()) > 100)
    lost = locals["D1"]
    lost._hear(Gone("killed by the test"))
    same(listen(fleet, heard=heard), expected)
    assert fleet.tally.lost == {"gone": 1} and fleet.tally.recovery.count > 0
    end(engines, locals)


def test_a_link_that_stalls_holds_up_no_other_and_changes_no_answer(engines, expected, monkeypatch):
    pulls, asked = connector(engines, "D1")._pulls, requests()[:6]
    monkeypatch.setattr(pulls, "how", pulls.how._replace(patience=1.0))
    porter = engines["D1"]._porter
    missed = porter.missed
    with wire(sender(engines, "P2").address, stalling(20_000)) as address:
        monkeypatch.setattr(sender(engines, "P2"), "address", address)
        fleet, locals = make_fleet(engines, "P1", "P2", "D1")
        for request in asked:
            fleet.add(request)
        heard = listen(fleet)
        same(heard, {key: each for key, each in expected.items() if key[0] in {request.id for request in asked}})
        assert fleet.tally.retries == porter.missed - missed > 0 and not fleet.tally.lost
        assert fleet.tally.missed == {("P2", "D1"): fleet.tally.retries}
        end(engines, locals)


WHENS = {
    "at once": lambda engines, heard: True,
    "when prompts are computed": lambda engines, heard: engines["P1"].counters.running,
    "when pages are copied": lambda engines, heard: connector(engines, "P1")._promised,
    "when pages are on offer": lambda engines, heard: len(sender(engines).offers),
    "when some are answered": lambda engines, heard: heard,
    "when others wait for a slot": lambda engines, heard: heard and len(sender(engines).offers) > 2,
}


@pytest.mark.parametrize("when", WHENS)
def test_a_request_that_is_aborted_leaves_nothing_anywhere(engines, when):
    fleet, locals = make_fleet(engines, "P1", "D1")
    params = SamplingParams(max_tokens=100, n=2 * engines["D1"].options.max_num_seqs, ignore_eos=True)
    request = replace(requests()[0], params=params)
    fleet.add(request)
    listen(fleet, until=lambda heard: WHENS[when](engines, heard))
    assert fleet.busy
    fleet.abort(request.id)
    assert not fleet.busy
    assert eventually(lambda: not any(engines[name].busy or engines[name].offered for name in locals))
    assert [engines[name].counters.pages_used for name in locals] == [0, 0]
    end(engines, locals)


def test_an_instance_that_has_lost_its_router_withdraws_what_it_has_on_offer(engines):
    _, locals = make_fleet(engines, "P1")
    for number, request in enumerate(requests()[:3]):
        params = SamplingParams(temperature=0, max_tokens=1)
        locals["P1"].add(replace(request, id=f"lent {number}", params=params, export=True))
    assert eventually(lambda: len(sender(engines).offers) == 3)
    locals["P1"].abort("lent 1")
    assert eventually(lambda: engines["P1"].offered == 2)
    locals["P1"].abort_all()
    assert eventually(lambda: engines["P1"].offered == 0)
    end(engines, locals)
