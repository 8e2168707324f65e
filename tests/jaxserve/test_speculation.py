"""What guesses change: how many tokens a step gives. And what they don't: which."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers.sampling import entropy
from jaxserve.request import Request, SamplingParams
from jaxserve.steps import Gate
from tests.jaxserve.conftest import engine, loaded
from tests.oracles import generate, reference

pytestmark = pytest.mark.xdist_group("embedded")  # compiled in one process

PROMPT = "def quicksort(items):\n    if len(items) <= 1:\n"  # a page of 16 tokens, and some more
HOW: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 1.0, "seed": 5}}
NEW = 25
OPEN = 100.0


@functools.cache
def ids() -> tuple[int, ...]:
    return tuple(loaded("embedded")[2].encode(PROMPT))


@pytest.fixture
def make():
    """An engine that launches a round at a time, with its gate as asked for; as others know it again afterwards."""
    gates = {}
    for how in HOW:
        said(how)  # which takes an engine

    def make(drafts: int, nats: float = OPEN, rows: int = 32):
        subject = engine("embedded", drafts)
        gates.setdefault(subject, subject._gate)
        subject._gate, subject._rounds = Gate(jnp.float32(nats), jnp.int32(rows)), lambda: 1
        subject._schedulers[0].limits = subject._schedulers[0].limits._replace(tokens=128)
        subject._schedulers[0].pool.clear()
        return subject

    yield make
    for subject, gate in gates.items():
        subject._gate = gate
        del subject._rounds


def request(how: str, id: str = "0") -> Request:
    return Request(id, ids(), SamplingParams(max_tokens=NEW, ignore_eos=True, **HOW[how]))


def run(subject, how: str, disturb=lambda: None, count: int = 1):
    """Of each request: the lengths of its outputs, after that of the prompt; and its tokens."""
    for i in range(count):
        subject.add(request(how, str(i)))
    found: dict[str, list[tuple[int, ...]]] = {str(i): [] for i in range(count)}
    while subject.busy:
        for output in subject.step():
            found[output.request_id].append(output.token_ids)
        disturb()
    lengths = [[len(part) for part in parts[1:]] for parts in found.values()]
    return lengths, [[t for part in parts for t in part] for parts in found.values()]


@functools.cache
def said(how: str) -> list[int]:
    """The prompt and what follows, with two tokens more than are asked for. The oracle would choose each of them."""
    config, weights = loaded("embedded")[3:]
    tokens = list(ids())
    subject = engine("embedded", 1)
    params = SamplingParams(max_tokens=NEW + 2, ignore_eos=True, **HOW[how])
    subject.add(Request("0", ids(), params))
    while subject.busy:
        tokens += [t for output in subject.step() for t in output.token_ids]
    scores = reference.logits(config, weights, tokens)
    for place in range(len(ids()), len(tokens)):
        assert generate.choose(scores[place - 1], [], ids(), place, set(), HOW[how]) == tokens[place]
    return tokens


@functools.cache
def module_scores(how: str) -> np.ndarray:
    """Row i is the MTP module's scores for token i + 2."""
    return reference.mtp_logits(*loaded("embedded")[3:], said(how))


def guess(how: str, place: int, drawn_as: str) -> int:
    """The module's guess at the token of a place."""
    return generate.choose(module_scores(how)[place - 2], [], ids(), place, set(), HOW[drawn_as])


def rows_by_the_reference(how: str, drawn_as: str, nats: float = OPEN) -> tuple[int, int, int]:
    """Rows that an answer with one guess takes, those of them that are wide, and guesses that hold."""
    place, limit = len(ids()), len(ids()) + NEW
    rows = wide = held = 0
    while place < limit - 1:
        rows += 1
        is_wide = float(entropy(jnp.asarray(module_scores(how)[place - 1 : place]))[0]) <= nats
        right = place + 2 < limit and guess(how, place + 1, drawn_as) == said(how)[place + 1]
        wide, held = wide + is_wide, held + (is_wide and right)
        place += 1 + (is_wide and right)
    return rows, wide, held


def counted(subject, do):
    """Rows, wide rows and guesses that held, while something is done."""
    c = subject.counters
    before = c.decoded_rows, c.wide_rows, list(c.accepted)
    do()
    held = [new - old for new, old in zip(c.accepted, before[2], strict=True)]
    return c.decoded_rows - before[0], c.wide_rows - before[1], held


def overwrite(subject, how: str, is_right) -> None:
    """Puts guesses into the slots of the sequences that run: the next tokens, or others."""
    slots, drafts = subject._state.slots, subject.drafts
    drafts_sk = np.array(slots.drafts_sk)
    for s in subject._schedulers[0].running:
        place = int(slots.positions_s[s.slot])
        if place >= 0:
            for i in range(drafts):
                token = said(how)[place + 1 + i]
                drafts_sk[s.slot, i] = token if is_right(place - len(ids()), i) else (token + 1) % 4096
    subject._state = subject._state._replace(slots=slots._replace(drafts_sk=jnp.asarray(drafts_sk)))


PATTERNS = {
    "right": lambda turn, i: True,
    "wrong": lambda turn, i: False,
    "first": lambda turn, i: i == 0,
    "later": lambda turn, i: i > 0,
    "mixed": lambda turn, i: turn % 3 == 0,
}


def lengths_by_pattern(pattern: str, drafts: int) -> list[int]:
    """Tokens of each row: guesses count up to the first that is wrong, and where the answer has room for them."""
    turn, found = 0, []
    while turn < NEW - 1:
        right = [PATTERNS[pattern](turn, i) for i in range(drafts)]
        found.append(min(1 + [*right, False].index(False), NEW - 1 - turn))
        turn += found[-1]
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("drafts", [1, 2])
def test_guesses_change_how_many_tokens_a_row_gives_and_not_which(make, drafts, how, pattern):
    subject, result = make(drafts), []
    change = functools.partial(overwrite, subject, how, PATTERNS[pattern])
    rows, _, held = counted(subject, lambda: result.extend(run(subject, how, change)))
    (lengths,), (tokens,) = result
    expected = lengths_by_pattern(pattern, drafts)
    assert tokens == said(how)[len(ids()) :][:NEW]
    assert lengths == expected
    assert rows == len(expected)
    assert held == [sum(n > i + 1 for n in expected) for i in range(drafts)]
    if pattern in ("right", "wrong"):
        assert set(lengths) == {1 + drafts if pattern == "right" else 1}


@pytest.mark.parametrize("how", HOW)
def test_the_rows_that_are_wide_are_those_whose_guess_is_sure_by_the_reference(make, how):
    counts = []
    for nats in (0.0, 0.5, 1.0, 2.0, 4.0, OPEN):
        subject, result = make(1, nats), []
        rows, wide, (held,) = counted(subject, lambda: result.extend(run(subject, how)))  # noqa: B023
        assert result[1] == [said(how)[len(ids()) :][:NEW]]
        assert (rows, wide, held) == rows_by_the_reference(how, how, nats)
        counts.append((rows, wide))
    rows = [rows for rows, _ in counts]
    assert rows == sorted(rows, reverse=True)
    assert counts[0] == (NEW - 1, 0)
    assert counts[-1][0] == counts[-1][1] < NEW - 1


@pytest.mark.parametrize(("most", "is_open"), [(1, False), (2, True)])
def test_with_more_rows_than_speculation_max_seqs_guesses_are_not_verified(make, most, is_open):
    subject, result = make(1, rows=most), []
    _, wide, _ = counted(subject, lambda: result.extend(run(subject, "greedy", count=2)))
    assert result[1] == [said("greedy")[len(ids()) :][:NEW]] * 2
    assert (wide > 0) == is_open


def test_with_too_many_rows_no_guess_is_made_and_the_module_follows_all_the_same(make):
    """So it guesses as ever when there are fewer again."""
    subject, seen = make(1, rows=0), []

    def look():
        for s in subject._schedulers[0].running:
            slots = subject._state.slots
            place = int(slots.positions_s[s.slot])
            if place >= 0:
                seen.append((place, int(slots.drafts_sk[s.slot, 0]), float(slots.entropy_s[s.slot])))
        if len(seen) == 10:
            subject._gate = Gate(jnp.float32(OPEN), jnp.int32(1))

    _, wide, _ = counted(subject, lambda: run(subject, "greedy", look))
    made = [(place, token) for place, token, nats in seen if np.isfinite(nats)]
    assert len(seen) - len(made) == 9  # the first is made with the prompt
    assert made == [(place, guess("greedy", place + 1, "greedy")) for place, _ in made]
    assert wide == len(made) - 1  # all the others are verified


def test_a_sampled_request_s_guess_is_drawn_with_the_noise_of_its_place(make):
    subject = make(1)
    rows, _, (held,) = counted(subject, lambda: run(subject, "sampled"))
    assert (rows, rows, held) == rows_by_the_reference("sampled", "sampled")
    _, _, most_probable = rows_by_the_reference("sampled", "greedy")
    assert held > 2 * most_probable  # 9 and 2; over six seeds 54 and 28


@pytest.mark.parametrize("hit", [False, True], ids=["cold", "hit"])
@pytest.mark.parametrize("drafts", [1, 2])
def test_the_first_guess_is_the_module_s_own_after_every_step(make, drafts, hit):
    subject, seen = make(drafts), []
    if hit:
        run(subject, "greedy")
    cached = subject.counters.cached_tokens

    def look():
        for s in subject._schedulers[0].running:
            place = int(subject._state.slots.positions_s[s.slot])
            if place >= 0:
                seen.append((place, int(subject._state.slots.drafts_sk[s.slot, 0])))

    run(subject, "greedy", look)
    assert (subject.counters.cached_tokens > cached) == hit
    assert seen[0][0] == len(ids()) and len(seen) > 5
    assert seen == [(place, guess("greedy", place + 1, "greedy")) for place, _ in seen]
