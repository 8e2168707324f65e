import json
import math
from contextlib import contextmanager

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from jaxserve import echo
from jaxserve.checkpoints.evaluation.scoring import Likelihood
from jaxserve.checkpoints.evaluation.tasks import Item
from jaxserve.client import Client
from jaxserve.parallel.errors import ServerError
from tests.jaxserve.openai_server import serving
from tests.jaxserve.test_cli import run


@contextmanager
def answering(answer):
    """A client of a server that answers completions so."""

    async def completions(request):
        return JSONResponse(answer(await request.json()))

    with serving(Starlette(routes=[Route("/v1/completions", completions, methods=["POST"])])) as url:
        with Client(url) as client:
            yield client


def letters(text: str) -> list[int]:
    return list(text.encode())


HALF = -math.log(2)


def choice(chosen, best, index: int = 0) -> dict:
    return {"index": index, "logprobs": {"token_logprobs": chosen, "top_logprobs": best}}


def test_prompts_are_tokens_and_all_that_is_asked_for_is_their_echo():
    bodies = []

    def answer(body):
        bodies.append(body)
        best = [None, {"a": -0.1}, {"b": 2 * HALF}, {"c": -0.5, "d": 3 * HALF}]
        return {"choices": [choice([None, HALF, 2 * HALF, 3 * HALF], best, index) for index in (1, 0)]}

    with answering(answer) as client:
        found = echo.likelihoods(client, "m", letters, [Item("", "ab", ("cd", "ef"), 0)])
    assert found == [[Likelihood(pytest.approx(-5.0), 2, 1)] * 2]
    prompts = [[97, 98, 99, 100], [97, 98, 101, 102]]
    body = {"model": "m", "prompt": prompts, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    assert bodies == [body]


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"choices": [{"index": 0, "logprobs": None}]},
        {"choices": [choice([None, -1.0], [None, {"a": -1.0}])]},  # fewer than there are tokens
        {"choices": [choice([None, -1.0, None], [None, {"a": -1.0}, {"a": -1.0}])]},
        {"choices": [choice([None, -1.0, -1.0], [None, {"a": -1.0}, None])]},
    ],
)
def test_a_server_that_does_not_echo_is_told_what_is_missing(answer):
    with answering(lambda body: answer) as client:
        with pytest.raises(ServerError, match="does not echo prompts with log-probabilities .*; use a server whose"):
            echo.likelihoods(client, "m", letters, [Item("", "ab", ("c",), 0)])


def test_eval_asks_a_server_and_compares_it_with_what_was_kept(tmp_path):
    def answer(body):
        """Every token has half of the probability, and is the most probable one."""
        sizes = enumerate(len(row) - 1 for row in body["prompt"])
        return {"choices": [choice([None] + [HALF] * size, [None] + [{"a": HALF}] * size, i) for i, size in sizes]}

    kept, given = tmp_path / "kept.json", ("--tasks", "perplexity,next-token,bracket", "--limit", "2")
    with answering(answer) as client:
        first = run("eval", "--url", client.url, "--model", "m", *given, "--out", str(kept))
        again = run("eval", "--url", client.url, "--model", "m", *given, "--against", str(kept))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(f"m at {client.url}, Python 3.")
    found = json.loads(kept.read_text())
    assert (found["model"], found["url"], found["tokenizer"]) == ("m", client.url, "embedded")
    bits, tokens = ([item["value"] for item in found["tasks"][name]["items"]] for name in ("perplexity", "next-token"))
    assert bits == pytest.approx(tokens)  # a bit for each token, and all of them expected
    assert found["tasks"]["next-token"]["score"]["value"] == 1.0
    assert again.stdout.startswith(f"A: m at {client.url}, Python 3.")
