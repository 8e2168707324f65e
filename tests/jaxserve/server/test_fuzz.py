"""Every endpoint, asked with what its description allows, and with what it doesn't (schemathesis)."""

from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from jaxserve import LLM
from jaxserve.server.service import Limits
from tests.jaxserve.conftest import SIZE, with_few_shapes
from tests.jaxserve.server.conftest import Running, running
from tests.waiting import SOON, eventually

pytestmark = pytest.mark.xdist_group("server")

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    negative_data_rejection,
]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    """{% if tools %}<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>{% endif %}"""
)
CASES = {
    "/v1/completions": {"sound": 560, "positive": 120, "negative": 120},
    "/v1/chat/completions": {"sound": 420, "positive": 90, "negative": 90},
    "/tokenize": {"sound": 120, "positive": 50, "negative": 50},
    "/detokenize": {"sound": 80, "positive": 50, "negative": 50},
    "/v1/models/{name}": {"positive": 100},
}
BARE = 20
"""Of other paths, which take nothing: 2,000 in all."""

words = st.lists(st.integers(0, 99).map("t{}".format), min_size=1, max_size=9).map(" ".join)
ids = st.lists(st.integers(0, 96), min_size=1, max_size=9)
some = lambda strategy: st.lists(strategy, min_size=1, max_size=3)  # noqa: E731
SAMPLED = {
    "model": st.sampled_from(["tiny", "alias", None]),
    "n": st.integers(1, 3),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 99),
    "min_p": st.floats(0, 1),
    "seed": st.integers(),
    "stop": words | some(words),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.1, 10),
    "logit_bias": st.dictionaries(st.integers(0, 96).map(str), st.floats(-100, 100), max_size=5),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    "structured_outputs": st.sampled_from([{"choice": ["t5", "t7t8"]}, {"regex": "(t[1-9])+"}, {"json": True}]),
    "stop_token_ids": ids,
    "allowed_token_ids": ids,
    "bad_words": words | some(words),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "user": st.text(),
    "priority": st.integers(-3, 3),
    "cache_salt": st.text(),
    **{
        name: st.none() | st.booleans()
        for name in ("stream", "ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
    },
}
messages = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": words}), min_size=1)
tools = st.just([{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}])
SOUND = {
    "/v1/completions": (
        {"prompt": words | ids | some(words) | some(ids), "max_tokens": st.integers(1, 6)},
        SAMPLED | {"echo": st.booleans(), "logprobs": st.integers(0, 5)},
    ),
    "/v1/chat/completions": (
        {"messages": messages, "max_completion_tokens": st.integers(1, 6)},
        SAMPLED
        | {"logprobs": st.just(True), "tools": tools, "tool_choice": st.sampled_from(["none", "auto", "required"])}
        | {"add_generation_prompt": st.booleans(), "chat_template_kwargs": st.dictionaries(st.text(), st.text())},
    ),
    "/tokenize": ({"prompt": st.text()}, {"add_special_tokens": st.booleans()}),
    "/detokenize": ({"tokens": ids}, {"model": st.just("tiny")}),
}
"""Of each path, what must be given and what may be, with values that are mostly right: a description has no ranges."""


@st.composite
def sound(draw: st.DrawFn, operation: APIOperation) -> Case:
    must, may = SOUND[operation.path]
    names = draw(st.lists(st.sampled_from(sorted(may)), max_size=6, unique=True))
    body = {name: draw(strategy) for name, strategy in (must | {name: may[name] for name in names}).items()}
    return operation.Case(body=body, media_type="application/json")


def cases(operation: APIOperation, kind: str) -> st.SearchStrategy[Case]:
    if operation.path not in CASES:
        return st.integers().map(lambda _: operation.Case())
    return sound(operation) if kind == "sound" else operation.as_strategy(generation_mode=GenerationMode(kind))


@pytest.fixture(scope="module")
def server(tiny_folder) -> Iterator[Running]:
    llm = LLM(tiny_folder, **SIZE | {"max_model_len": 64})
    llm.tokenizer.chat_templates = {"default": TEMPLATE}
    with_few_shapes(llm.engine)
    with running(llm, Limits(max_tokens=8, priority=True)) as server:
        yield server


@pytest.fixture(scope="module")
def operations(server) -> list[APIOperation]:
    with server.client() as http:
        return [
            each.ok() for each in schemathesis.openapi.from_dict(http.get("/openapi.json").json()).get_all_operations()
        ]


class Seen(NamedTuple):
    """What was sent where, and the status that came."""

    method: str
    path: str
    kind: str
    status: int


def jobs(operation: APIOperation) -> Collection[tuple[str, int]]:
    """Kinds of cases, and how many of each."""
    return CASES.get(operation.path, {"positive": BARE}).items()


def fuzz(server: Running, operation: APIOperation, kind: str, count: int) -> Counter[Seen]:
    """Asks so many times, and checks what comes."""
    seen: Counter[Seen] = Counter()

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases(operation, kind))
    def ask(case: Case) -> None:
        response = case.call_and_validate(server.url, session, checks=CHECKS, timeout=SOON)
        seen[Seen(operation.method.upper(), operation.path, kind, response.status_code)] += 1

    with requests.Session() as session:
        ask()
    return seen


def test_whatever_is_sent_is_answered_as_the_description_says_and_leaves_nothing_behind(server, operations):
    ask = {"prompt": [5, 7], "max_tokens": 8, "temperature": 0}
    with server.client() as http:
        expected = http.post("/v1/completions", json=ask).json()["choices"]
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(fuzz, server, operation, *job) for operation in operations for job in jobs(operation)]
        if failures := [failure for each in asked if (failure := each.exception())]:
            raise BaseExceptionGroup("what comes is not what is described", failures)
        assert http.get("/health").json() == {"status": "ready"}
        assert http.post("/v1/completions", json=ask).json()["choices"] == expected
    seen = sum((each.result() for each in asked), Counter())
    posted = {key: count for key, count in seen.items() if key.method == "POST"}
    answered = sum(count for key, count in posted.items() if key.status == 200)
    assert seen.total() >= 2000 and answered > sum(posted.values()) / 3, seen
    assert eventually(lambda: not server.llm.engine.busy)
    assert server.llm.engine.counters.pages_used == 0


def test_other_methods_are_refused_with_those_that_there_are(server, operations):
    with server.client() as http:
        for operation in operations:
            path = operation.path.replace("{name}", "tiny")
            described = {each.method.upper() for each in operations if each.path == operation.path}
            for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - described:
                refused = http.request(method, path)
                assert (refused.status_code, refused.headers["Content-Type"]) == (405, "application/json")
                assert described <= set(refused.headers["Allow"].split(", "))
