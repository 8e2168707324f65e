"""Two processes of four devices each serve requests of their own, on one mesh."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.jaxserve.conftest import GOLDENS, loaded, word_tokenizer
from tests.oracles.generate import generate
from tests.oracles.reference import logits
from tests.processes import free_ports

NAME = "deepseek_v3"
ROOT = Path(__file__).parents[2]


def ask(rng: random.Random, length: int, new: int, **how) -> dict:
    prompt = [rng.randrange(2, 97) for _ in range(length)]
    return {"prompt": prompt, "params": {"temperature": 0, "max_tokens": new, "ignore_eos": True, **how}}


def rounds() -> list[list[list[dict]]]:
    """Calls of `generate`; of each, what the first process asks, and the second.

    One has long prompts, the other short ones and a longer answer; then one has nothing to ask, then all again.
    """
    rng = random.Random(0)
    sampled = {"temperature": 0.8, "top_k": 50, "seed": 7}
    first = [
        [ask(rng, 40, 4), ask(rng, 3, 6, **sampled), ask(rng, 17, 5, presence_penalty=2.0)],
        [
            ask(rng, 20, 20),
            ask(rng, 9, 4, prompt_logprobs=0),
            ask(rng, 1, 3),
            ask(rng, 6, 9, allowed_token_ids=list(range(9, 60))),
        ],
    ]
    return [first, [[], [ask(rng, 12, 6)]], first]


def expected(request: dict) -> list[int]:
    *_, config, weights = loaded(NAME)
    return generate(config, weights, request["prompt"], **request["params"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / NAME
    shutil.copytree(GOLDENS / NAME, folder)
    (folder / "tokenizer.json").write_text(word_tokenizer(97).to_json())
    return folder


def known(request: dict) -> list[float]:
    """How probable the oracle finds the prompt's tokens after the first."""
    *_, config, weights = loaded(NAME)
    tokens = request["prompt"]
    scores_tu = logits(config, weights, tokens)[:-1]
    logprobs_tu = scores_tu - np.log(np.exp(scores_tu).sum(axis=-1, keepdims=True))
    return [float(row[token]) for row, token in zip(logprobs_tu, tokens[1:], strict=True)]


def start(process: int, port: int, model: Path, file: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.jaxserve.one_of_two", str(process), str(port), str(model), str(file)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory) -> list[dict]:
    """What each process says at its end."""
    (port,), where, asked = free_ports(1), tmp_path_factory.mktemp("asked"), rounds()
    files = [where / f"{process}.json" for process in range(2)]
    for process, file in enumerate(files):
        file.write_text(json.dumps([each[process] for each in asked]))
    running = [start(process, port, folder, file) for process, file in enumerate(files)]
    try:
        said = [process.communicate(timeout=400) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(err[-3000:] for _, err in said)
    return [json.loads(out.split("\nFOUND ")[1]) for out, _ in said]


def test_each_process_gets_the_tokens_of_its_own_requests(found):
    for process in range(2):
        for requests, answers in zip([each[process] for each in rounds()], found[process]["found"], strict=True):
            assert [answer["tokens"] for answer in answers] == [expected(request) for request in requests]


def test_a_prompt_s_log_probabilities_come_from_wherever_it_was_computed(found):
    request, answer = rounds()[0][1][1], found[1]["found"][0][1]
    assert answer["known"][0] is None
    assert [value for (value,) in answer["known"][1:]] == pytest.approx(known(request), abs=1e-4)


def test_loads_are_counted_over_all_and_prompts_are_found_again(found):
    assert found[0]["load"] == found[1]["load"] > 0
    assert all(each["cached"] > 0 for each in found)


def test_processes_that_are_set_up_otherwise_are_told_so(folder, tmp_path):
    (tmp_path / "none.json").write_text("[]")
    (port,) = free_ports(1)
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    running = [start(i, port, model, tmp_path / "none.json") for i, model in enumerate((folder, other))]
    for process in running:
        _, error = process.communicate(timeout=200)
        assert process.returncode and "ProcessError: process 1 has config" in error


def test_when_a_process_has_ended_the_next_call_of_another_says_so_at_once(folder, tmp_path):
    (port,), files = free_ports(1), [tmp_path / f"{process}.json" for process in range(2)]
    for file, calls in zip(files, ("[]", "[[]]"), strict=True):
        file.write_text(calls)
    running = [start(process, port, folder, file) for process, file in enumerate(files)]
    (_, first), (_, second) = (process.communicate(timeout=120) for process in running)
    assert "Error" not in first
    assert running[1].returncode and "ProcessError: a process of the mesh has left" in second
