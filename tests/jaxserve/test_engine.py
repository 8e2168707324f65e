import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import RequestError, SamplingParams
from jaxserve.checkpoints import hf
from jaxserve.engine import Engine
from jaxserve.options import EngineConfig
from jaxserve.request import Request
from tests.jaxserve.conftest import GOLDENS, SIZE, greedy, serve, tokens, word_tokenizer
from tests.oracles import reference

PROMPTS = [[3], [5, 7, 11, 13], list(range(2, 40)), [1, 1, 2, 3, 5, 8, 13]]
DRAWN = SamplingParams(temperature=1.0, top_k=20, top_p=0.9, max_tokens=12, seed=7, ignore_eos=True)


@pytest.mark.parametrize("name", sorted(p.name for p in GOLDENS.iterdir()))
def test_greedy_tokens_are_those_of_transformers(make_engine, name):
    golden = np.load(GOLDENS / name / "golden.npz")
    prompts = [golden[f"prompt_{i}"] for i in range(3)]
    outputs = serve(make_engine(name), prompts, greedy(20))
    for i in range(3):
        assert tokens(outputs[i]) == golden[f"greedy_{i}"].tolist()


@pytest.mark.parametrize("params", [greedy(12), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3"])
def test_a_batch_gives_the_tokens_that_each_prompt_gives_alone(make_engine, name, params):
    engine = make_engine(name)
    together = [tokens(o) for o in serve(engine, PROMPTS, params)]
    assert together == [tokens(serve(engine, [p], params)[0]) for p in PROMPTS]


def test_more_requests_than_slots_give_the_same_tokens(make_engine):
    engine, many = make_engine(), PROMPTS * 3
    alone = [tokens(serve(engine, [prompt], DRAWN)[0]) for prompt in PROMPTS]
    assert [tokens(o) for o in serve(engine, many, DRAWN)] == alone * 3


def test_seeds_differ_and_a_seed_repeats(make_engine):
    params = [SamplingParams(temperature=1.5, seed=s, max_tokens=12, ignore_eos=True) for s in (1, 2, 1)]
    first, second, third = (tokens(o) for o in serve(make_engine(), [[5, 6]] * 3, params))
    assert first == third != second


def test_requests_without_a_seed_differ_and_the_engine_s_seed_repeats_them(make_engine):
    params = SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True)
    runs = [[tokens(o) for o in serve(make_engine(seed=3), [[5, 6]] * 2, params)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_a_stop_token_ends_the_answer_and_is_its_reason(make_engine):
    whole = tokens(serve(make_engine(), [[5, 7]], greedy(10))[0])
    stop = whole[4]
    outputs = serve(make_engine(), [[5, 7]], greedy(10, stop_token_ids=[stop]))[0]
    assert tokens(outputs) == whole[: whole.index(stop) + 1]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)


def test_no_stop_token_is_chosen_before_min_tokens(make_engine):
    whole = tokens(serve(make_engine(), [[5, 7]], greedy(10))[0])
    outputs = serve(make_engine(), [[5, 7]], greedy(10, stop_token_ids=whole[:4], min_tokens=6))[0]
    assert not set(tokens(outputs)[:6]) & set(whole[:4])
    assert len(tokens(outputs)) >= 6


def test_an_answer_ends_where_the_engine_is_full(make_engine):
    prompt = [2 + i % 90 for i in range(SIZE["max_model_len"] - 5)]
    outputs = serve(make_engine(), [prompt], greedy(50))[0]
    assert len(tokens(outputs)) == 5
    assert outputs[-1].finish_reason == "length"


def test_logprobs_are_those_of_the_reference(make_engine):
    engine = make_engine("deepseek_v3_plain")
    outputs = serve(engine, [[5, 7, 9]], greedy(4, logprobs=3))[0]
    weights = {n: np.asarray(t.read(), np.float64) for n, t in hf.open_folder(GOLDENS / "deepseek_v3_plain").items()}
    config = hf.read_json(GOLDENS / "deepseek_v3_plain")
    scores = reference.logits(config, weights, [5, 7, 9, *tokens(outputs)])[2:6]
    expected = np.log(reference.softmax(scores))
    for step, found in enumerate(found for output in outputs for found in output.logprobs):
        assert list(found) == np.argsort(-expected[step])[:3].tolist()
        assert [p.rank for p in found.values()] == [1, 2, 3]
        np.testing.assert_allclose([p.logprob for p in found.values()], expected[step][list(found)], atol=1e-4)


def test_an_aborted_request_leaves_its_slot_to_the_next(make_engine):
    engine = make_engine()
    for i in range(4):
        engine.add(Request(f"long {i}", (5, 7), greedy(100)))
    engine.add(Request("next", (5, 7), greedy(2)))
    engine.step()
    for i in range(4):
        engine.abort(f"long {i}")
    engine.abort("unknown")
    ids = {output.request_id for _ in range(5) for output in engine.step()}
    assert ids == {"next"}
    assert not engine.busy


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], greedy(1), "the prompt has no tokens"),
        (list(range(1, 21)), greedy(1), r"prompt has 20 tokens; this engine accepts 19 .*Raise max_model_len"),
        ([1, 97], greedy(1), "prompt_token_ids has 97; the model's tokens are 0 to 96"),
        ([1, -1], greedy(1), "prompt_token_ids has -1"),
        ([1], greedy(1, stop_token_ids=[500]), "stop_token_ids has 500"),
        ([1], greedy(1, stop_token_ids=list(range(40))), "stop_token_ids has 40 tokens; it must have at most"),
    ],
)
def test_what_can_not_be_served_is_refused_before_it_is_queued(make_engine, prompt, params, message):
    engine = make_engine(max_model_len=20)
    with pytest.raises(RequestError, match=message):
        engine.add(Request("x", tuple(prompt), params))
    assert engine.step() == []


def test_a_length_beyond_the_model_s_positions_is_refused(make_engine):
    with pytest.raises(RequestError, match="max_model_len = 100000: it must be from 2 to"):
        make_engine(max_model_len=100_000)


def test_scores_that_are_not_finite_end_their_request_and_no_other():
    cfg, model = hf.load(GOLDENS / "qwen3")
    broken = model._replace(embed=model.embed.at[9].set(jnp.nan))
    engine = Engine(broken, cfg, word_tokenizer(cfg.vocab_size), EngineConfig(**SIZE))
    bad, good = serve(engine, [[9], [5, 7]], greedy(3))
    assert (bad[-1].finish_reason, bad[-1].token_ids) == ("error", ())
    assert "scores are not finite" in bad[-1].error
    assert len(tokens(good)) == 3
