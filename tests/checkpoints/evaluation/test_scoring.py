import re
from itertools import accumulate

import numpy as np
import pytest

from jaxserve.checkpoints.evaluation import scoring
from jaxserve.checkpoints.evaluation.scoring import Encoded, encode_item, likelihoods
from jaxserve.checkpoints.evaluation.tasks import Item
from jaxserve.layers.config import Config
from jaxserve.parallel.errors import RequestError
from tests.layers.helpers import published, random_model, raw_config
from tests.oracles import reference
from tests.tolerances import MODEL, assert_close

TINY = {family: Config.tiny(family) for family in ("deepseek_v3", "qwen3")}


def letters(text: str) -> list[int]:
    """A token a character, after one that opens the text."""
    return [1, *(ord(character) % 95 + 2 for character in text)]


def items() -> list[Item]:
    """Contexts around the ends of tiles, and choices that reach over them."""
    rng = np.random.default_rng(0)
    text = "".join(map(chr, rng.integers(33, 120, 200)))
    sizes = [(1, (1,)), (14, (1, 2, 18)), (15, (3, 1)), (16, (2, 30, 1, 1)), (17, (16,)), (40, (5, 4))]
    return [
        Item("m", text[:size], tuple(chr(60 + i) + text[size : size + more - 1] for i, more in enumerate(each)), 0)
        for size, each in sizes
    ]


@pytest.mark.parametrize("family", TINY)
def test_likelihoods_are_the_reference_s_whatever_else_is_in_a_step(family, monkeypatch):
    monkeypatch.setattr(scoring, "TILES", 11)  # several steps
    monkeypatch.setattr(scoring, "HEAD_ROWS", 24)
    cfg, told = TINY[family], []
    model = random_model(cfg, np.random.default_rng(0))
    weights = published(model)
    found = likelihoods(model, cfg, letters, items(), lambda *call: told.append(call))
    for item, got in zip(items(), found, strict=True):
        for choice, one in zip(item.choices, got, strict=True):
            tokens = np.array(letters(item.context + choice))
            places = np.arange(len(item.context), len(tokens) - 1)
            expected = np.log2(reference.softmax(reference.logits(raw_config(family), weights, tokens[:-1])))[places]
            assert_close(one.log2, expected[range(len(places)), tokens[places + 1]].sum(), MODEL)
            assert one[1:] == (len(places), (expected.argmax(axis=1) == tokens[places + 1]).sum())
    assert len(told) > 1 and told[-1] == (len(items()), len(items()))


def test_nothing_to_score_is_no_error():
    assert likelihoods(random_model(TINY["qwen3"], np.random.default_rng(0)), TINY["qwen3"], letters, []) == []


def test_an_item_with_more_tokens_than_positions_is_refused():
    item = Item("m", "x" * TINY["qwen3"].max_positions, ("a",), 0)
    with pytest.raises(RequestError, match=f"has {TINY['qwen3'].max_positions + 1} tokens before its last one"):
        likelihoods(random_model(TINY["qwen3"], np.random.default_rng(0)), TINY["qwen3"], letters, [item])


def pairs(text: str) -> list[int]:
    """Tokens of one letter, or of an `a` and a `b`."""
    return [len(word) * 1000 + ord(word[0]) for word in re.findall("ab|.", text)]


@pytest.mark.parametrize(
    ("context", "choices", "first"),
    [
        ("xyz", ("a", "c"), 3),  # the choices' own tokens
        ("xya", ("b", "c"), 2),  # a token crosses: both count from where it begins
        ("xya", ("c", "d"), 3),
        ("xy", ("ca", "cb"), 2),  # what choices share is theirs
        ("a", ("b", "c"), 1),  # the first token is never predicted
    ],
)
def test_choices_count_from_where_a_token_differs_from_the_context_s(context, choices, first):
    got = encode_item(Item("m", context, choices, 0), pairs)
    assert got == Encoded(tuple(tuple(pairs(context + choice)) for choice in choices), first)


def test_choices_that_the_vocabulary_can_not_tell_apart_have_one_likelihood():
    item, cfg = Item("m", "x" * 17, (")", "]", "}", ")]"), 0), TINY["qwen3"]
    unknown = lambda text: [3] * (len(text) // 2)  # noqa: E731
    model = random_model(cfg, np.random.default_rng(0))
    for one in likelihoods(model, cfg, unknown, [item] * 70):
        assert len({choice.log2 for choice in one[:3]}) == 1 and one[0].tokens == 1


def test_a_step_computes_a_context_once_and_every_row_sees_all_its_tokens():
    context = tuple(range(1, 41))
    part = [Encoded(((9, 8, 7),), 1), Encoded(((*context, 50), (*context, *range(60, 80)), (*context, 70, 71)), 40)]
    step = scoring.pack(part, tiles=10, pages=4)
    assert [item.tiles for item in part] == [1, 3 + 2 + 1]
    tokens, positions = step.batch.tokens_t.reshape(10, 16), step.batch.positions_t
    assert (positions >= 0).sum() == 2 + 40 + (59 - 32) + (41 - 32)
    for slot, row in enumerate([part[0].rows[0], *part[1].rows]):
        seen = tokens[step.batch.pages_sp[slot]].reshape(-1)
        assert tuple(seen[: len(row) - 1]) == row[:-1]
    starts = list(accumulate([1, 3, 2, 1]))
    assert step.batch.slots_a.tolist()[: starts[-1]] == [0, 1, 1, 1, 2, 2, 3]
    assert step.asked_t.sum() == 2 + 1 + 20 + 2
    assert sorted(step.next_t[step.asked_t].tolist()) == sorted([8, 7, 50, *range(60, 80), 70, 71])
