import re
import zlib

import numpy as np
import pytest

from jaxserve.checkpoints.evaluation import suite, tasks
from jaxserve.checkpoints.evaluation.scoring import Likelihood
from jaxserve.checkpoints.evaluation.statistics import Parts
from jaxserve.checkpoints.evaluation.suite import Evaluation, Measured
from jaxserve.checkpoints.evaluation.tasks import TASKS, Item
from jaxserve.layers.config import Config
from jaxserve.parallel.errors import RequestError
from tests.layers.helpers import random_model

CHOICES = [task for task in TASKS if task.scoring in ("sum", "per byte")]


def words(text: str) -> list[int]:
    """A token a word or sign."""
    return [0, *(zlib.crc32(word.encode()) % 96 + 1 for word in re.findall(r"\w+|\s+|\W", text))]


def measured(values: list[float], fingerprint: str = "f", modules: str = "abcd", scoring="sum") -> Measured:
    return Measured(
        scoring, fingerprint, Parts(list(modules), values, [1.0] * len(values)), [[-1.0, -2.0]] * len(values)
    )


@pytest.mark.parametrize("task", CHOICES, ids=lambda task: task.name)
def test_a_model_that_knows_all_answers_is_always_right(task):
    items = tasks.items(task)
    known = [[Likelihood(-1.0 if i == item.answer else -1e6, 1, 1) for i in range(len(item.choices))] for item in items]
    got = suite.judge(task.scoring, items, known)
    assert suite.score(got).value == 1.0 and suite.score(got).high == pytest.approx(1.0)


@pytest.mark.parametrize("task", CHOICES, ids=lambda task: task.name)
def test_a_model_that_guesses_is_right_by_chance(task):
    items, rng = tasks.items(task), np.random.default_rng(0)
    share = np.mean(
        [
            suite.score(suite.judge(task.scoring, items, guesses(items, rng))).value
            for _ in range(10)
        ]
    )  # fmt: skip
    assert suite.chance(suite.judge(task.scoring, items, guesses(items, rng))) == pytest.approx(
        1 / len(items[0].choices)
    )
    assert share == pytest.approx(1 / len(items[0].choices), abs=0.05)


def guesses(items, rng) -> list[list[Likelihood]]:
    sizes = [[len(choice.encode()) for choice in item.choices] for item in items]
    return [[Likelihood(-rng.exponential() * size, 1, 0) for size in each] for each in sizes]


def test_scores_are_of_sums_or_of_bytes_or_of_tokens():
    item = Item("m", "context", ("short", "twice as long"), 0)
    found = [[Likelihood(-10.0, 2, 1), Likelihood(-13.0, 4, 1)]]
    parts = {
        scoring: suite.judge(scoring, [item], found).parts[1:] for scoring in ("bits", "tokens", "sum", "per byte")
    }
    assert parts == {"bits": ([10.0], [5]), "tokens": ([1], [2]), "sum": ([1.0], [1.0]), "per byte": ([0.0], [1.0])}


def test_a_model_is_measured_on_all_tasks_and_computes_what_two_share_once():
    cfg, told = Config.tiny("qwen3", num_hidden_layers=1, max_position_embeddings=512), []
    model = random_model(cfg, np.random.default_rng(0))
    found = suite.measure(model, cfg, words, limit=2, show=lambda *call: told.append(call))
    assert list(found) == [task.name for task in TASKS]
    assert all(len(one.log2) == len(one.parts.modules) == 2 for one in found.values())
    assert told[-1] == (2 * len(TASKS) - 2, 2 * len(TASKS) - 2)
    assert found["perplexity"].log2 == found["next-token"].log2
    bits, tokens = sum(found["perplexity"].parts.values), sum(found["next-token"].parts.weights)
    assert suite.perplexity(found) == pytest.approx(np.exp(bits * np.log(2) / tokens))
    assert suite.perplexity({"bracket": found["bracket"]}) is None
    assert suite.chance(found["perplexity"]) is None and suite.score(found["perplexity"]).value > 0


def test_tasks_are_chosen_by_name_in_the_order_given():
    assert suite.chosen_tasks() == TASKS
    assert [task.name for task in suite.chosen_tasks(["keyword", "bracket", "keyword"])] == ["keyword", "bracket"]
    with pytest.raises(RequestError, match="there is no task 'brackets'; there are perplexity, next-token"):
        suite.chosen_tasks(["brackets"])


def test_a_difference_counts_the_answers_that_changed():
    one, other = (Evaluation({}, {"t": measured(values)}) for values in ([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]))
    got = suite.compare(one, other)["t"]
    assert (got.by.value, got.gained, got.lost, got.p) == (0.25, 2, 1, 1.0)
    assert got.by.low < 0 < got.by.high


def test_running_text_has_a_difference_and_no_changed_answers():
    one, other = (
        Evaluation({}, {"t": measured(values, scoring="bits")}) for values in ([1.0, 2.0, 3.0, 4.0], [2.0] * 4)
    )
    got = suite.compare(one, other)["t"]
    assert got.by.value == 0.5 and got[1:] == (None, None, None)


def test_different_items_are_not_compared():
    task = measured([1.0] * 4)
    one = Evaluation({"python": "3.12.1"}, {"t": task})
    other = Evaluation({"model": "B", "python": "3.11.7", "limit": 4}, {"t": measured([1.0] * 4, "g")})
    with pytest.raises(RequestError, match=r"^t: B had other items \(python 3.11.7, limit 4\)"):
        suite.compare(one, other)
    with pytest.raises(RequestError, match="only one of the two has s, u; evaluate both with the same tasks"):
        suite.compare(Evaluation({}, {"t": task, "u": task}), Evaluation({}, {"t": task, "s": task}))


def test_fingerprints_are_those_of_what_is_measured():
    asked = suite.fingerprints([TASKS[3]], 5)
    items = tasks.items(TASKS[3])
    assert asked == {TASKS[3].name: tasks.fingerprint(items[:5])} != suite.fingerprints([TASKS[3]])
