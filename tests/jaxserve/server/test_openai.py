"""OpenAI's own client against the server, over TCP; what it gets is what `LLM` gives."""

import json
from unittest.mock import ANY

import openai
import pytest

from jaxserve import SamplingParams
from tests.waiting import eventually

pytestmark = pytest.mark.xdist_group("server")

PROMPT = "def quicksort(items):"
MESSAGES = [{"role": "user", "content": "def add(a, b):"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(embedded):
    greedy = SamplingParams(temperature=0, max_tokens=24, logprobs=3)
    return {
        "greedy": embedded.generate(PROMPT, greedy)[0],
        "drawn": embedded.generate(PROMPT, SamplingParams(seed=7, max_tokens=24, n=3))[0],
        "chat": embedded.chat(MESSAGES, greedy)[0],
    }


@pytest.fixture(scope="module")
def server(expected, server):
    """After what is expected is known: two can't step one engine."""
    return server


def test_a_completion_is_that_of_the_library(client, expected):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.choices[0].text == expected["greedy"].outputs[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == "tiny"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 24)
    assert answer.usage.total_tokens == 33


def test_a_stream_gives_the_same_in_pieces_and_the_usage_if_asked_for(client, expected):
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == expected["greedy"].outputs[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    assert all(c.usage is None for c in chunks[:-1])


def test_tokens_as_a_prompt_and_several_prompts_are_answered_in_order(client, server, expected):
    ids = server.llm.tokenizer.encode(PROMPT)
    answer = client.completions.create(model="tiny", prompt=[ids, [5, 7], ids], max_tokens=24, temperature=0, n=1)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert answer.choices[0].text == answer.choices[2].text == expected["greedy"].outputs[0].text
    assert answer.choices[1].text != answer.choices[0].text


def test_several_answers_with_a_seed_are_those_of_the_library(client, expected):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, seed=7, n=3)
    assert [c.text for c in answer.choices] == [o.text for o in expected["drawn"].outputs]
    negative = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, seed=7 - 2**32, n=3)
    assert [c.text for c in negative.choices] == [o.text for o in expected["drawn"].outputs]


def test_what_was_computed_before_is_reported_as_cached(client):
    prompt = "import os\n" * 12
    first, second = (client.completions.create(model="tiny", prompt=prompt, max_tokens=1) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens > 16


def test_logprobs_of_a_completion_are_those_of_the_library(client, expected):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, logprobs=3)
    found, known = answer.choices[0].logprobs, expected["greedy"].outputs[0]
    chosen = [scores[t] for t, scores in zip(known.token_ids, known.logprobs, strict=True)]
    assert found.tokens == [each.decoded_token for each in chosen]
    assert found.token_logprobs == pytest.approx([each.logprob for each in chosen], abs=1e-4)
    assert all(3 <= len(top) <= 4 or len(set(top)) < 3 for top in found.top_logprobs)
    places = zip(found.text_offset, found.tokens, strict=True)
    assert all(answer.choices[0].text.startswith(token, at) for at, token in places)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_in_front_with_its_own_logprobs(client, server, stream):
    known = prompt_logprobs(server)
    asked = dict(model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=1, echo=True, n=2)
    if stream:
        choices = [[], []]
        for chunk in client.completions.create(**asked, stream=True):
            choices[chunk.choices[0].index].append(chunk.choices[0])
        tokens = [[t for c in each for t in c.logprobs.tokens] for each in choices]
        scores = [[s for c in each for s in c.logprobs.token_logprobs] for each in choices]
        texts = ["".join(c.text for c in each) for each in choices]
    else:
        answer = client.completions.create(**asked)
        tokens = [c.logprobs.tokens for c in answer.choices]
        scores = [c.logprobs.token_logprobs for c in answer.choices]
        texts = [c.text for c in answer.choices]
    for i in range(2):
        assert texts[i].startswith(PROMPT) and len(tokens[i]) == 9 + 4
        assert scores[i][0] is None
        assert scores[i][1:9] == pytest.approx(known, abs=1e-4)


def prompt_logprobs(server):
    """Of the prompt's tokens, by a completion of a token less each: a second way to the same numbers."""
    ids = server.llm.tokenizer.encode(PROMPT)
    with server.client() as http:
        found = []
        for end in range(1, len(ids)):
            body = {
                "prompt": ids[:end],
                "max_tokens": 1,
                "logprobs": 0,
                "allowed_token_ids": [ids[end]],
                "temperature": 0,
            }
            answer = http.post("/v1/completions", json=body).json()
            found += answer["choices"][0]["logprobs"]["token_logprobs"]
    return found


def test_echo_alone_generates_nothing(client):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    assert answer.choices[0].text == PROMPT
    assert len(answer.choices[0].logprobs.tokens) == 9
    assert answer.usage.completion_tokens == 0 and answer.usage.total_tokens == 9
    chunks = list(
        client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=0, stream=True, stream_options={"include_usage": True},
            extra_body={"echo": True},
        )
    )  # fmt: skip
    assert "".join(c.choices[0].text for c in chunks[:-1]) == PROMPT
    assert chunks[-1].usage == answer.usage.model_copy(update={"prompt_tokens_details": ANY})


def test_a_stop_text_ends_an_answer_and_is_named(client, expected):
    whole = expected["greedy"].outputs[0].text
    stop = whole[5:9]
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, stop=[stop])
    assert answer.choices[0].text == whole.split(stop)[0]
    assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", stop)


def test_logit_bias_by_token_as_text(client, server):
    (token,) = server.llm.tokenizer.encode(" x", add_special_tokens=False)
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=3, temperature=0, logit_bias={token: 100}
    )
    assert answer.choices[0].text == " x x x"


def test_a_conversation_is_answered_as_by_the_library(client, expected):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=24, temperature=0)
    assert answer.choices[0].message.content == expected["chat"].outputs[0].text
    assert answer.choices[0].message.role == "assistant" and answer.id.startswith("chatcmpl-")


def test_a_conversation_streams(client, expected):
    chunks = list(
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=24, temperature=0, stream=True)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected["chat"].outputs[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_logprobs_have_the_candidates_in_order_and_their_bytes(client, expected):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=24, temperature=0, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in found).decode() == expected["chat"].outputs[0].text
    for token in found:
        assert [c.logprob for c in token.top_logprobs] == sorted((c.logprob for c in token.top_logprobs), reverse=True)
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy


def test_an_answer_follows_a_json_schema(client):
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["ada", "bob"]}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=60, seed=3, response_format=form
    )
    person = json.loads(answer.choices[0].message.content)
    assert person["name"] in ("ada", "bob") and 1 <= person["age"] <= 99


def test_models_are_listed_and_the_unknown_one_is_not_found(client):
    listed = client.models.list().data
    assert [m.id for m in listed] == ["tiny", "alias"]
    assert client.models.retrieve("alias").max_model_len == 128
    assert client.completions.create(model="alias", prompt=PROMPT, max_tokens=1).model == "tiny"
    with pytest.raises(openai.NotFoundError, match="model 'gpt-5' is not served here; there is 'tiny', 'alias'"):
        client.completions.create(model="gpt-5", prompt=PROMPT)


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "temperature = -1.0: it must be a finite number, 0 or more"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens = 0: it must be 1 or more, unless echo is true"),
        ({"extra_body": {"best_of": 2}}, "best_of", "best_of: this field is not supported; leave it out"),
        ({"extra_body": {"stream_options": {"usage": 1}}}, "stream_options.usage", "stream_options.usage: this field"),
        ({"stop": 5}, "stop", "Expected `str | array | null`, got `int`"),
        ({"prompt": [5] * 200}, "prompt", "prompt has 200 tokens; this engine accepts 127"),
        ({"prompt": []}, "prompt", "prompt has nothing in it"),
        ({"prompt": [1, "a"]}, "prompt", "prompt has token ids beside other things"),
        ({"n": 129}, "n", "n = 129 answers, of all prompts together: at most 128"),
        ({"max_tokens": -1, "extra_body": {"echo": True}}, "max_tokens", "max_tokens = -1: it must be a whole number"),
        ({"stop": ["x"] * 129}, "stop", "stop has 129 texts of 129 characters; it must have"),
        ({"extra_body": {"bad_words": ["x" * 4097]}}, "bad_words", "bad_words has 1 texts of 4097 characters"),
        ({"logprobs": 21}, "logprobs", "logprobs = 21: it must be a whole number from 0 to 20"),
    ],
)
def test_what_is_wrong_is_refused_by_name(client, asked, param, message):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{"model": "tiny", "prompt": PROMPT} | asked)
    assert error.value.param == param
    assert message in error.value.message
    assert error.value.type == "invalid_request_error"


def test_a_client_that_stops_reading_ends_its_request_and_frees_its_pages(client, server):
    before = server.llm.engine.counters.generated_tokens
    for _ in range(3):
        stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=100, stream=True, n=8)
        next(iter(stream))
        stream.close()
    assert eventually(lambda: not server.llm.engine.busy)
    assert server.llm.engine.counters.generated_tokens - before < 3 * 8 * 100
    assert server.llm.engine.counters.pages_used == 0
