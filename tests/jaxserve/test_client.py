import asyncio

import pytest

from jaxserve.client import AsyncClient, Client, refusal
from jaxserve.parallel.errors import ServerError
from tests.jaxserve.openai_server import Fake, serving


@pytest.fixture(scope="module")
def url():
    with serving(Fake().app()) as url:
        yield url


def asked(url: str, prompt: str, count: int = 3) -> list[dict]:
    with Client(url) as client:
        return list(client.stream("/v1/completions", {"prompt": prompt, "max_tokens": count}))


def asked_of_many(url: str, prompt: str, count: int = 3) -> list[dict]:
    async def ask() -> list[dict]:
        async with AsyncClient(url) as client:
            return [chunk async for chunk in client.stream("/v1/completions", {"prompt": prompt, "max_tokens": count})]

    return asyncio.run(ask())


@pytest.mark.parametrize("ask", [asked, asked_of_many])
@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_stream_is_its_chunks_up_to_done_whatever_the_url_ends_in(ask, end, url):
    *words, last, counts = ask(url + end, "hello")
    assert [chunk["choices"][0]["text"] for chunk in words] == ["w0 ", "w1 ", "w2 "]
    assert last["choices"][0]["finish_reason"] == "length"
    assert counts["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("ask", [asked, asked_of_many])
@pytest.mark.parametrize(
    ("prompt", "kind", "message"),
    [
        ("refuse me", "HTTP 400", "/v1/completions answers 400: 'refuse me' is refused"),
        ("html", "HTTP 502", "answers 502: Bad Gateway, and no reason in JSON"),
        ("break", "broken off", "the server broke off its answer: a step failed"),
        ("cut", "cut off", r"ended a stream without \[DONE\]"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line_and_has_a_kind(ask, prompt, kind, message, url):
    with pytest.raises(ServerError, match=message) as caught:
        ask(url, prompt)
    assert caught.value.kind == kind
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ask", [asked, asked_of_many])
def test_a_server_that_is_not_there_is_told_with_the_way_out(ask):
    with pytest.raises(
        ServerError, match=r"no server at http://127.0.0.1:1 .*; start one with `jaxserve serve`"
    ) as caught:
        ask("http://127.0.0.1:1", "x")
    assert caught.value.kind == "no connection"


@pytest.mark.parametrize("url", ["localhost:8000", "http://[", "nowhere"])
def test_a_url_that_is_none_is_told(url):
    with pytest.raises(ServerError, match="nowhere|localhost|http"):
        asked(url, "x")


def test_a_server_that_gives_no_sign_of_life_is_given_up():
    with serving(Fake(delay=5).app()) as url, Client(url, timeout=0.05) as client:
        with pytest.raises(ServerError, match="gave no sign of life for too long") as caught:
            list(client.stream("/v1/completions", {"prompt": "x", "max_tokens": 1}))
    assert caught.value.kind == "ReadTimeout"


def test_a_full_server_is_asked_again_when_it_says_so():
    fake = Fake()
    with serving(fake.app()) as url, Client(url) as client:
        answer = client.post("/v1/completions", {"prompt": "full"})
    assert (answer["choices"][0]["text"], len(fake.asked)) == ("w0 ", 2)


def test_to_close_a_stream_is_to_hang_up():
    fake = Fake(delay=0.01)
    with serving(fake.app()) as url, Client(url, api_key="secret") as client:
        chunks = client.stream("/v1/completions", {"prompt": "x", "max_tokens": 10_000})
        assert next(chunks)["choices"][0]["text"] == "w0 "
        chunks.close()
    assert (fake.open, fake.keys) == (0, {"Bearer secret"})


def test_the_first_model_is_the_one_to_ask(url):
    with Client(url) as client:
        assert client.model() == {"id": "fake", "object": "model", "chat": True}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"error": {"message": "no\nsuch model", "type": "x"}}, "no such model"),
        ({"error": "queue is full"}, "queue is full"),
        ({"object": "error", "message": "vLLM's older form"}, "vLLM's older form"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"choices": [], "error": None}, None),
        ([], None),
    ],
)
def test_the_forms_in_which_servers_refuse_are_known(content, message):
    assert refusal(content) == message
