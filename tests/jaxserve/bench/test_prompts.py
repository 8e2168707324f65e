import pytest

from jaxserve.bench.prompts import PASSAGE, PLAIN_IDS, jobs, known_tokens, spelled
from jaxserve.bench.workload import OWN, SHARED, Ask, Piece
from jaxserve.client import Client
from tests.jaxserve.openai_server import Fake, serving

ASKS = [Ask((Piece((SHARED, 0), 4), Piece((OWN, 0), 6)), None, 9, 0.5), Ask((), "text", 3)]


@pytest.fixture(scope="module")
def client():
    with serving(Fake().app()) as url, Client(url) as client:
        yield client


@pytest.fixture(scope="module")
def bare():
    """Of a server that has no words."""
    with serving(Fake(tokenizes=False).app()) as url, Client(f"{url}/nothing") as client:
        yield client


def test_words_are_the_tokens_that_the_server_makes_of_a_passage(client):
    assert known_tokens(client) == sorted({7 + len(word) for word in PASSAGE.split()})


def test_a_server_that_has_no_words_gets_those_that_any_vocabulary_has(bare):
    assert known_tokens(bare) == list(PLAIN_IDS)
    text = spelled(bare, [100, 101, 100])
    first, second, third = text.split()
    assert first == third != second


def test_completions_get_tokens_and_chat_their_text(client):
    common = {"model": "m", "ignore_eos": True}
    drawn, text = jobs(client, ASKS, "completions", common, 0)
    assert (drawn.path, drawn.arrival, text.arrival) == ("/v1/completions", 0.5, None)
    assert len(drawn.body["prompt"]) == 10 and set(drawn.body["prompt"]) <= set(known_tokens(client))
    assert drawn.body | {"prompt": 0} == {"model": "m", "ignore_eos": True, "prompt": 0, "max_tokens": 9}
    assert text.body["prompt"] == "text"
    said, plain = jobs(client, ASKS, "chat", common, 0)
    assert said.path == "/v1/chat/completions"
    spelling = " ".join(f"<{token}>" for token in drawn.body["prompt"])
    assert said.body["messages"] == [{"role": "user", "content": spelling}]
    assert plain.body["messages"] == [{"role": "user", "content": "text"}]
