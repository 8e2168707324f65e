"""The clients of this project, asking its server."""

import asyncio

import pytest

from jaxserve import SamplingParams, echo, speakers
from jaxserve.bench import load, prompts, report, workload
from jaxserve.checkpoints.evaluation import scoring
from jaxserve.checkpoints.evaluation.tasks import Item
from jaxserve.client import AsyncClient, Client
from jaxserve.conversation import Piece
from jaxserve.parallel.errors import ServerError
from tests.jaxserve.conftest import loaded

CONTEXT = "import os\n\n\ndef size(path):\n    return os.path."
MESSAGES = [{"role": "user", "content": "def area(width, height):\n"}]
SAMPLINGS = [
    SamplingParams(max_tokens=24, temperature=0),
    SamplingParams(max_tokens=24, seed=5, top_p=0.9, top_k=40),
]


@pytest.fixture(scope="module", autouse=True)
def said(embedded) -> dict[SamplingParams, list[Piece]]:
    """What the model says in this process, before a server has it."""
    return {params: list(speakers.of_model(embedded, params)(MESSAGES)) for params in SAMPLINGS}


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_eval_over_http_finds_what_it_finds_in_process(server, max_tokens):
    cfg, model, tokenizer, *_ = loaded("embedded")
    items = [
        Item("m", CONTEXT, ("getsize(path)", "join(path)", "exists(path)"), 0),
        Item("m", CONTEXT[:9], ("\n", "path", "\x00é"), 0),
    ]
    told = []
    with Client(server.url) as client:
        name = client.model()["id"]
        found = echo.likelihoods(client, name, tokenizer.encode, items, lambda *call: told.append(call), max_tokens)
    assert told == [(1, 2), (2, 2)]
    expected = scoring.likelihoods(model, cfg, tokenizer.encode, items)
    for one, other in zip(found, expected, strict=True):
        assert [each[1:] for each in one] == [each[1:] for each in other]
        assert [each.log2 for each in one] == pytest.approx([each.log2 for each in other], rel=1e-4)


@pytest.mark.parametrize("params", SAMPLINGS)
def test_chat_over_http_says_what_it_says_in_process(said, server, params):
    with Client(server.url) as client:
        served = list(speakers.of_server(client, "tiny", params)(MESSAGES))
    assert "".join(piece.text for piece in served) == "".join(piece.text for piece in said[params]) != ""
    assert served[-1].cut == said[params][-1].cut


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_load_has_the_lengths_that_were_asked_for(server, endpoint):
    asks = workload.synthetic(6, workload.Lengths(8, 16), workload.Lengths(4, 6), 32, seed=0)
    with Client(server.url) as client:
        common = {"model": "tiny", "temperature": 0, "ignore_eos": True}
        jobs = prompts.jobs(client, asks, endpoint, common, seed=0)
    found = asyncio.run(load.run(AsyncClient(server.url), [], jobs, 3, lambda *_: None))
    summary = report.summarize(found, {"e2e": 60.0})
    assert (summary.answered, summary.good, summary.failures) == (6, 6, {})
    assert summary.output_tokens == sum(ask.output_tokens for ask in asks)
    if endpoint == "completions":
        assert summary.prompt_tokens == sum(piece.tokens for ask in asks for piece in ask.pieces)
        assert summary.cached_tokens >= 3 * 32  # at least of those that came when the first had been computed


def test_what_the_server_refuses_is_told_with_its_own_words(server):
    with Client(server.url) as client, pytest.raises(ServerError, match="answers 404: .*nobody") as caught:
        list(client.stream("/v1/completions", {"model": "nobody", "prompt": "x"}))
    assert caught.value.kind == "HTTP 404"
