"""What each sampling parameter does to the tokens, by an oracle that goes without a cache, a batch and guesses."""

import functools
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine import Engine
from jaxserve.options import EngineConfig
from jaxserve.request import Output, Request, SamplingParams
from tests.jaxserve.conftest import SIZE, tokens, with_few_shapes
from tests.jaxserve.test_product import engine as product_engine
from tests.jaxserve.test_product import loaded
from tests.oracles import reference
from tests.oracles.generate import generate

COUNT = 8  # tokens of an answer
PROMPTS = [(2, 3), (2,), (3, 1, 4, 1, 5, 9), (90, 8)]
MODELS = [
    "deepseek_v3",
    pytest.param("embedded", marks=pytest.mark.xdist_group("embedded")),  # compiled in one process
]


class Case(NamedTuple):
    """Parameters, and what the oracle is told of them where that is something else."""

    params: dict[str, Any]
    told: dict[str, Any] = {}


@functools.cache
def engine(name: str) -> Engine:
    if name == "embedded":
        return product_engine(name, 1)
    cfg, model, tokenizer, *_ = loaded(name)
    return with_few_shapes(Engine(model, cfg, tokenizer, EngineConfig(**SIZE)))


def collect(name: str, requests: list[tuple[Any, SamplingParams]], chunk=128, preempt_at=()) -> list[list[Output]]:
    """All outputs of each request. All guesses are verified; before some steps, one that runs is preempted."""
    subject, outputs = engine(name), [[] for _ in requests]
    scheduler, gate = subject._schedulers[0], subject._gate
    subject._gate = gate._replace(entropy=jnp.float32(jnp.inf))
    scheduler.limits = scheduler.limits._replace(tokens=chunk)
    for i, (prompt, params) in enumerate(requests):
        subject.add(Request(str(i), tuple(prompt), params))
    for count in itertools.count(1):
        if not subject.busy:
            subject._gate = gate
            return outputs
        assert count < 2000
        if count in preempt_at and scheduler.running:
            scheduler.preempt(scheduler.running[count % len(scheduler.running)])
        for output in subject.step():
            assert output.error is None
            outputs[int(output.request_id)].append(output)


def said(name: str, prompt, **params) -> list[int]:
    """What the engine says to a prompt alone."""
    return tokens(collect(name, [(prompt, SamplingParams(**params))])[0])


def text(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


def oracle(name: str, prompt, **params) -> list[int]:
    *_, config, weights = loaded(name)
    return generate(config, weights, prompt, **{"max_tokens": COUNT, **params})


@functools.cache
def plain(name: str, index: int) -> list[int]:
    """The oracle's greedy answer to a prompt."""
    return oracle(name, PROMPTS[index], temperature=0)


def cases(name: str) -> dict[str, Case]:
    """Each changes the greedy answer to the first prompt, or draws."""
    first, tokenizer = plain(name, 0), loaded(name)[2]
    one, two = (tokenizer.decode(run) for run in (first[1:2], first[3:5]))
    spelled = [" ".join(f"t{t}" for t in first[3:5]), f"t{first[1]}"] if name != "embedded" else [two, one]
    runs = [tokenizer.encode(s + w.lstrip(), add_special_tokens=False) for w in spelled for s in ("", " ")]
    some = list(range(1, loaded(name)[0].vocab_size, 3))
    return {
        "filters": Case({"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.02, "seed": 5}),
        "hot": Case({"temperature": 3.0, "top_k": 30, "seed": 6}),
        "penalties": Case(
            {
                "temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4,
                "seed": 1,
            }
        ),
        "repetition": Case({"repetition_penalty": 1.8}),
        "praise": Case({"repetition_penalty": 0.5, "frequency_penalty": -0.5}),
        "frequency": Case({"frequency_penalty": 2.0}),
        "presence": Case({"presence_penalty": 2.0}),
        "bias": Case({"logit_bias": {first[0]: -100.0, 17: 3.0, 40: 2.5}}),
        "allowed": Case({"allowed_token_ids": some}),
        "allowed and biased": Case(
            {"allowed_token_ids": some, "logit_bias": {4: 6.0, 5: 100.0}, "temperature": 1.0, "seed": 8}
        ),
        "bad words": Case({"bad_words": spelled}, {"bad_runs": runs}),
        "one bad word": Case({"bad_words": spelled[1]}, {"bad_runs": runs[2:]}),
        "min_tokens": Case(
            {"stop_token_ids": first[:3], "min_tokens": 5}, {"ends": first[:3], "min_tokens": 5}
        ),
        "all": Case(
            {
                "temperature": 1.2, "top_k": 40, "top_p": 0.97, "min_p": 0.001, "seed": 3, "repetition_penalty": 1.2,
                "presence_penalty": 0.3, "frequency_penalty": 0.2, "logit_bias": {17: 3.0}, "allowed_token_ids": some,
                "bad_words": spelled, "stop_token_ids": some[:4], "min_tokens": 4,
            },
            {"bad_runs": runs, "ends": some[:4]},
        ),
    }  # fmt: skip


CASES = [
    "filters", "hot", "penalties", "repetition", "praise", "frequency", "presence", "bias", "allowed",
    "allowed and biased", "bad words", "one bad word", "min_tokens", "all",
]  # fmt: skip


@pytest.mark.parametrize("which", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_the_oracle_s_alone_and_beside_others_that_ask_for_nothing(name, which):
    case = cases(name)[which]
    asked = {"temperature": 0.0, "ignore_eos": True, "max_tokens": COUNT} | case.params
    expected = oracle(name, PROMPTS[0], **asked | {"ignore_eos": None} | case.told)
    assert expected != plain(name, 0)
    assert said(name, PROMPTS[0], **asked) == expected
    greedy = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)
    others = [(prompt, greedy) for prompt in PROMPTS[1:]]
    found = collect(name, [*others[:2], (PROMPTS[0], SamplingParams(**asked)), *others[2:]])
    assert tokens(found.pop(2)) == expected
    assert [tokens(o) for o in found] == [plain(name, i) for i in (1, 2, 3)]


@pytest.mark.parametrize("name", MODELS)
def test_of_several_samples_the_ith_has_the_seed_plus_i(name):
    how = {"temperature": 1.5, "top_k": 30}
    params = SamplingParams(n=3, seed=2**32 - 2, max_tokens=COUNT, ignore_eos=True, **how)
    (outputs,) = collect(name, [(PROMPTS[0], params)])
    found = [tokens([o for o in outputs if o.index == i]) for i in range(3)]
    assert found == [oracle(name, PROMPTS[0], seed=seed, **how) for seed in (2**32 - 2, 2**32 - 1, 0)]


def test_samples_without_a_seed_differ_from_each_other_and_from_call_to_call():
    params = SamplingParams(n=3, temperature=1.5, max_tokens=COUNT, ignore_eos=True)
    runs = [collect("deepseek_v3", [(PROMPTS[0], params)])[0] for _ in range(2)]
    assert len({tuple(tokens([o for o in run if o.index == i])) for run in runs for i in range(3)}) == 6


@pytest.mark.parametrize("name", MODELS)
def test_a_stop_text_cuts_the_answer_before_it_or_after_it(name):
    how = {"temperature": 0, "max_tokens": COUNT, "ignore_eos": True}
    whole = loaded(name)[2].decode(plain(name, 0))
    stop = whole[len(whole) // 3 :][:4]
    for more, end in ({}, ""), ({"include_stop_str_in_output": True}, stop):
        (outputs,) = collect(name, [(PROMPTS[0], SamplingParams(stop=["never", stop], **how, **more))])
        assert text(outputs) == whole.split(stop)[0] + end
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)
        assert tokens(outputs) == plain(name, 0)[: len(tokens(outputs))]
        assert len(tokens(outputs)) < COUNT


@pytest.mark.parametrize("name", MODELS)
def test_without_max_tokens_an_answer_fills_the_engine(name):
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (outputs,) = collect(name, [(PROMPTS[0], params)])
    assert len(tokens(outputs)) == SIZE["max_model_len"] - len(PROMPTS[0])
    assert outputs[-1].finish_reason == "length"
    assert tokens(outputs)[:COUNT] == plain(name, 0)


@pytest.mark.xdist_group("embedded")
@pytest.mark.parametrize(("skip", "shown"), [(True, ""), (False, "special")])
def test_the_model_s_end_ends_an_answer_or_is_a_token_like_others(skip, shown):
    tokenizer = loaded("embedded")[2]
    (end,) = tokenizer.eos_ids
    how = {"temperature": 0, "max_tokens": 3, "logit_bias": {end: 100.0}, "skip_special_tokens": skip}
    (ended,) = collect("embedded", [(PROMPTS[0], SamplingParams(**how))])
    assert (tokens(ended), text(ended), ended[-1].finish_reason, ended[-1].stop_reason) == ([end], "", "stop", None)
    (ignored,) = collect("embedded", [(PROMPTS[0], SamplingParams(**how, ignore_eos=True))])
    assert tokens(ignored) == [end] * 3
    assert ignored[-1].finish_reason == "length"
    assert text(ignored) == tokenizer.decode([end] * 3, skip_special_tokens=skip)
    assert bool(text(ignored)) == bool(shown)


LONG = [1 + i * i % 89 for i in range(70)]


def check_logprobs(name: str, outputs: list[Output], prompt, count: int, prompt_count: int | None) -> None:
    """Against the log-softmax of the reference's scores, for the whole sequence at once."""
    *_, config, weights = loaded(name)
    sequence = [*prompt, *tokens(outputs)]
    expected = np.log(reference.softmax(reference.logits(config, weights, sequence)))
    found = {len(prompt) + i: p for i, p in enumerate(p for output in outputs for p in output.logprobs)}
    assert len(found) == len(tokens(outputs))
    if prompt_count is not None:
        assert outputs[0].prompt_logprobs is not None and len(outputs[0].prompt_logprobs) == len(prompt)
        assert outputs[0].prompt_logprobs[0] is None
        found |= dict(enumerate(outputs[0].prompt_logprobs[1:], start=1))
    assert all(output.prompt_logprobs is None for output in outputs[prompt_count is not None :])
    for place, some in found.items():
        row, wanted = expected[place - 1], prompt_count if place < len(prompt) else count
        assert list(some)[0] == sequence[place]
        assert set(some) == {sequence[place], *np.argsort(-row)[:wanted].tolist()}
        np.testing.assert_allclose([p.logprob for p in some.values()], row[list(some)], atol=1e-4)
        assert [p.rank for p in some.values()] == [1 + int((row > row[t]).sum()) for t in some]


@pytest.mark.parametrize("preempt_at", [(), (3, 5, 9, 13)], ids=["undisturbed", "preempted"])
@pytest.mark.parametrize("chunk", [128, 16], ids=["whole", "chunked"])
@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_the_reference_s_however_the_prompt_is_computed(name, chunk, preempt_at):
    how = {"temperature": 0.9, "seed": 4, "max_tokens": COUNT, "ignore_eos": True}
    asked = [(2, None), (0, 3), (None, None), (1, 0)]
    prompts = [LONG, LONG, LONG, LONG[:9]]
    engine(name)._schedulers[0].pool.clear()
    collect(name, [(LONG, SamplingParams(**how))])
    params = [SamplingParams(**how, logprobs=answer, prompt_logprobs=prompt) for answer, prompt in asked]
    before = engine(name)._schedulers[0].preemptions
    found = collect(name, list(zip(prompts, params, strict=True)), chunk, preempt_at)
    assert (engine(name)._schedulers[0].preemptions > before) == bool(preempt_at)
    for outputs, prompt, (count, prompt_count) in zip(found, prompts, asked, strict=True):
        if count is not None:
            check_logprobs(name, outputs, prompt, count, prompt_count)
    assert all(o.logprobs == () and o.prompt_logprobs is None for o in found[2])
    size = engine(name)._schedulers[0].pool.page_size
    assert [o[0].num_cached_tokens for o in found] == [69 // size * size, 0, 69 // size * size, 0]
    assert tokens(found[0]) == tokens(found[1]) == tokens(found[2])


def test_a_prompt_of_one_token_has_no_logprobs_but_its_place():
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=5)
    (outputs,) = collect("deepseek_v3", [((3,), params)])
    assert outputs[0].prompt_logprobs == (None,)


def test_penalties_and_bias_do_not_change_logprobs():
    params = SamplingParams(
        temperature=0.5, seed=3, max_tokens=COUNT, ignore_eos=True, logprobs=3, repetition_penalty=1.7, top_k=5,
        logit_bias={9: 50.0}, frequency_penalty=1.0,
    )  # fmt: skip
    (outputs,) = collect("deepseek_v3", [(PROMPTS[2], params)])
    check_logprobs("deepseek_v3", outputs, PROMPTS[2], 3, None)


def test_the_cached_part_of_a_prompt_is_told_with_the_first_output_alone():
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    engine("deepseek_v3")._schedulers[0].pool.clear()
    for expected in (0, 64):
        (outputs,) = collect("deepseek_v3", [(LONG, params)])
        assert [o.num_cached_tokens for o in outputs] == [expected] + [0] * (len(outputs) - 1)
