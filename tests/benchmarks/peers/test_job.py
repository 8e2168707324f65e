import json

import numpy as np
import pytest

from benchmarks.peers import job
from benchmarks.peers.job import Answer, Job, greedy

ASKED = Job("folder", "int8", (1, 4, 16), 8, 3, 100, 0, 60.0)


class Counting:
    """The next token is the last one and one more; the one after that is half as probable."""

    def start(self, prompts):
        return self.go_on([prompt[-1] for prompt in prompts])

    def go_on(self, tokens):
        logits_su = np.full((len(tokens), 10), -np.inf, np.float32)
        for logits_u, token in zip(logits_su, tokens, strict=True):
            logits_u[token + 1], logits_u[token + 2] = np.log(2.0), 0.0
        return logits_su


def test_the_most_probable_token_goes_on_for_each_prompt():
    found = greedy(Counting())([[7, 1], [7, 4]], 3, True)
    assert found.tokens == [[2, 3, 4], [5, 6, 7]]
    np.testing.assert_allclose(found.logprobs, np.log(2 / 3), rtol=1e-6)
    assert found.decode_tokens == 4  # the first of each belongs to prefill
    assert greedy(Counting())([[1]], 2, False).logprobs == []


def test_prompts_have_one_length_and_differ_by_seed_and_batch():
    first = job.prompts(ASKED, 4, 8)
    assert [len(prompt) for prompt in first] == [8] * 4
    assert first == job.prompts(ASKED, 4, 8)
    assert first != job.prompts(ASKED._replace(seed=1), 4, 8)
    assert first[0] != job.prompts(ASKED, 1, 8)[0]


def test_a_runner_says_its_version_and_each_batch_and_leaves_out_what_would_take_too_long(monkeypatch, capsys):
    def answer(prompts, new, logprobs):
        return Answer([[1] * new for _ in prompts], [], 5.0 * len(prompts), 1.0, (new - 1) * len(prompts))

    monkeypatch.setattr("sys.argv", ["runner", json.dumps(ASKED._asdict())])
    job.run(lambda asked: answer, "library 1.0")
    version, one, four, sixteen = map(json.loads, capsys.readouterr().out.splitlines())
    assert version == {"version": "library 1.0"}
    assert (one["batch"], one["decode_tokens"], len(one["tokens"])) == (1, 2, 1)
    assert (four["batch"], four["prefill_seconds"]) == (4, 20.0)
    assert sixteen == {"batch": 16, "expected": pytest.approx(84.0)}
