"""Two hundred mixed requests while instances are killed: each answer is the undisturbed one, complete, said once."""

import itertools
import json
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest

from jaxserve import LLM, SamplingParams
from tests.jaxserve.fleet.test_processes import SLOW, members, metric
from tests.processes import START_UP, Process, process
from tests.waiting import eventually

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.slow]

REQUESTS, CLIENTS, LENGTH = 200, 24, 128
PATIENCE = 300.0
SIZE = "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--cache-gb", "1"


def asked() -> list[dict[str, Any]]:
    """Short and long prompts, some of which begin alike; greedy and drawn; with penalties, scores and stops."""
    rng = random.Random(0)
    base = [rng.randrange(1, 97) for _ in range(LENGTH)]
    ways: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0.7, "seed": 12, "top_k": 9, "repetition_penalty": 1.2},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0.9, "seed": 13, "stop": ["t7t", "t33"], "bad_words": ["t5"]},
        {"temperature": 0.8, "seed": 14, "min_p": 0.01, "presence_penalty": 0.5},
    ]
    found = []
    for number in range(REQUESTS):
        size, same = rng.randint(1, 80), rng.random() < 0.5
        prompt = base[:size] if same else [rng.randrange(1, 97) for _ in range(size)]
        length = {"max_tokens": rng.randint(1, 40), "ignore_eos": True}
        found.append({"prompt": prompt, **length, **ways[number % len(ways)]})
    return found


def expected(folder: Any, bodies: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Texts of one engine alone, and their tokens."""
    llm = LLM(folder, max_model_len=LENGTH, max_num_seqs=8, max_num_batched_tokens=64, warmup=False)
    params = [SamplingParams(**{key: body[key] for key in body if key != "prompt"}) for body in bodies]
    results = llm.generate([body["prompt"] for body in bodies], params)
    return [(result.outputs[0].text, len(result.outputs[0].token_ids)) for result in results]


def answer(http: httpx2.Client, body: dict[str, Any], streamed: bool, done: list[int]) -> tuple[str, int]:
    """The text of an answer, and its tokens as the server counts them; streams end once, and as they should."""
    if not streamed:
        whole = http.post("/v1/completions", json=body).json()
        done[0] += 1
        return whole["choices"][0]["text"], whole["usage"]["completion_tokens"]
    text, reasons, count = "", [], 0
    how = {"stream": True, "stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/completions", json=body | how) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for chunk in (json.loads(line[6:]) for line in lines[:-1]):
        count = chunk["usage"]["completion_tokens"] if chunk.get("usage") else count
        for choice in chunk["choices"]:
            text += choice["text"]
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    done[0] += 1
    assert len(reasons) == 1 and reasons[0] in ("length", "stop")
    return text, count


def test_killed_instances_change_no_answer_of_two_hundred(tiny_folder):
    bodies = asked()
    wanted = expected(tiny_folder, bodies)
    with ExitStack() as stack:

        def begin(*words: str, plant: str = "") -> Process:
            given = "serve", str(tiny_folder), *words, "--max-model-len", str(LENGTH)
            return stack.enter_context(process(*given, plant=plant))

        def instance(role: str) -> Process:
            return begin("--role", role, "--router", address, *SIZE, plant=SLOW)

        router = begin("--role", "router", "--port", "0", "--control-port", "0", "--no-log-requests")
        address = router.find(r"instances join at (\S+)")
        first, _, decode = (instance(role) for role in ("prefill", "prefill", "decode"))
        http = stack.enter_context(httpx2.Client(base_url=router.url(), timeout=PATIENCE))
        assert eventually(lambda: (members(http, "prefill"), members(http, "decode")) == (2, 1), START_UP)
        done = [0]
        with ThreadPoolExecutor(CLIENTS) as pool:
            asking = (pool.submit(answer, http, body, number % 3 > 0, done) for number, body in enumerate(bodies))
            answers = list(itertools.islice(asking, REQUESTS // 2))
            assert eventually(lambda: done[0] > 20, PATIENCE)
            first.process.kill()
            instance("decode")
            assert eventually(lambda: members(http, "decode") == 2, START_UP)
            retries = metric(http, "retries_total")
            answers += asking  # by now the others may all be answered: it takes long to start
            assert eventually(lambda: done[0] > REQUESTS // 2 + 20, PATIENCE)
            decode.process.kill()
            found = [each.result() for each in answers]
        assert found == wanted
        assert (members(http, "prefill"), members(http, "decode")) == (1, 1)
        assert metric(http, 'instances_lost_total{why="gone"}') == 2
        assert metric(http, "retries_total") > retries
        assert metric(http, 'jobs{stage="waiting"}') == metric(http, 'jobs{stage="decode"}') == 0
