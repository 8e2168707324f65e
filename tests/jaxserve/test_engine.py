import itertools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import RequestError, SamplingParams
from jaxserve.checkpoints import hf
from jaxserve.engine import Engine, Launched
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


def test_a_priority_that_has_no_order_is_refused(make_engine):
    with pytest.raises(RequestError, match="priority = None: it must be a whole number"):
        make_engine().add(Request("x", (1, 2), greedy(2), priority=None))  # type: ignore[arg-type]


def test_what_is_asked_for_is_what_it_was_when_it_was_asked_for(make_engine):
    engine, ids = make_engine(), [5, 6]
    engine.add(Request("x", (1, 2), greedy(4, allowed_token_ids=ids)))
    ids.append(10**6)
    said = [t for _ in range(40) for output in engine.step() for t in output.token_ids]
    assert len(said) == 4 and set(said) <= {5, 6}


def test_after_a_step_that_failed_halfway_the_engine_says_so_and_why(make_engine, monkeypatch):
    engine = make_engine()
    engine.add(Request("x", (1, 2), greedy(4)))

    def fail(plan):
        raise MemoryError("no room")

    monkeypatch.setattr(engine, "_launch", fail)
    with pytest.raises(MemoryError, match="no room"):
        engine.step()
    for again in (engine.step, lambda: engine.add(Request("y", (1, 2), greedy(4)))):
        with pytest.raises(RuntimeError, match="the engine has failed in an earlier step") as error:
            again()
        assert isinstance(error.value.__cause__, MemoryError)


@pytest.mark.parametrize("where", ["_launch", "_read"])
def test_after_a_failed_step_answers_that_ran_are_errors_and_all_others_are_as_ever(make_engine, monkeypatch, where):
    prompts = [[5 + i, 7, 11] for i in range(6)]  # two more than slots
    whole = [tokens(o) for o in serve(make_engine(), prompts, greedy(12))]
    engine = make_engine()
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), tuple(prompt), greedy(12)))
    for _ in range(3):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine, where, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    lost = engine.recover()
    assert {(o.request_id, o.finish_reason) for o in lost} == {(str(i), "error") for i in range(4)}
    assert "the engine failed in a step: ZeroDivisionError" in lost[0].error
    said = {str(i): [] for i in (4, 5)}
    while engine.busy:
        for output in engine.step():
            said[output.request_id] += output.token_ids
    assert list(said.values()) == whole[4:]
    assert [tokens(o) for o in serve(engine, prompts, greedy(12))] == whole
    assert engine.counters.pages_used == 0


def test_outputs_of_a_step_that_fails_while_it_is_read_are_not_lost(make_engine, monkeypatch):
    engine = make_engine()
    for i in range(3):
        engine.add(Request(str(i), (5, 7 + i), greedy(2)))
    grow = engine._answers.grow

    def fail_after_one(*given):
        yield next(iter(grow(*given)))
        raise MemoryError

    outputs = []
    with monkeypatch.context() as patch:
        patch.setattr(engine._answers, "grow", fail_after_one)
        with pytest.raises(MemoryError):
            while True:
                outputs += engine.step()
    outputs += engine.recover()
    assert sorted(o.request_id for o in outputs if o.finish_reason) == ["0", "1", "2"]
    assert len([t for o in outputs for t in o.token_ids]) == 1
    assert not engine.busy


def test_the_load_of_experts_counts_each_computed_token_once_for_each_of_its_experts(make_engine):
    engine = make_engine("deepseek_v3_plain", enable_prefix_caching=False)
    before = engine.expert_load()
    assert not before.any()
    serve(engine, PROMPTS, greedy(12))
    computed = sum(len(prompt) + 12 for prompt in PROMPTS)
    experts = engine.cfg.experts
    once = (engine.expert_load() - before).sum(axis=1)
    assert len(once) == engine.cfg.mixtures
    # The last token of an answer is computed only if a step was launched before it was known to be the last.
    assert all((computed - len(PROMPTS)) * experts.per_token <= each <= computed * experts.per_token for each in once)


def test_an_id_is_refused_as_long_as_its_request_is_not_answered(make_engine):
    engine = make_engine()
    engine.add(Request("x", (5, 7), greedy(2)))
    with pytest.raises(RequestError, match="request id 'x' is taken by a request that is not answered yet"):
        engine.add(Request("x", (5,), greedy(2)))
    assert len([t for _ in range(4) for output in engine.step() for t in output.token_ids]) == 2
    engine.add(Request("x", (5,), greedy(2)))
    engine.abort("x")


def test_what_the_queue_has_no_room_for_is_refused_and_leaves_nothing(make_engine):
    engine = make_engine(max_num_queued=1)  # besides four that run
    with pytest.raises(RequestError, match="n = 6: at most 5 answers can run or wait at once"):
        engine.add(Request("many", (5, 7), greedy(2, n=6)))
    assert not engine.busy
    engine.add(Request("most", (5, 7), greedy(2, n=4)))
    full = "the queue is full: 4 answers wait, of 1 that may besides 4 that can start; 2 needed; try again later"
    with pytest.raises(RequestError, match=full):
        engine.add(Request("more", (5, 7), greedy(2, n=2)))
    engine.step()
    engine.add(Request("next", (5, 7), greedy(2)))  # those before it run
    with pytest.raises(RequestError, match="1 answers wait, of 1 that may besides 0 that can start; 1 needed"):
        engine.add(Request("last", (5, 7), greedy(2)))
    answered = [output for _ in range(8) for output in engine.step() if output.finish_reason]
    assert [(o.request_id, o.index) for o in answered] == [*(("most", i) for i in range(4)), ("next", 0)]


def test_an_engine_without_a_queue_serves_what_can_start_at_once(make_engine):
    engine = make_engine(max_num_queued=0)
    assert [len(tokens(o)) for o in serve(engine, PROMPTS, greedy(2))] == [2] * 4
    with pytest.raises(RequestError, match="the queue is full"):
        serve(engine, [*PROMPTS, [4]], greedy(2))


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_aborted_request_ends_all_its_answers(make_engine, steps):
    engine = make_engine()
    engine.add(Request("many", (5, 7), greedy(100, n=6)))
    for _ in range(steps):
        engine.step()
    engine.add(Request("next", (5, 7), greedy(2)))
    engine.abort("many")
    outputs = [output for _ in range(4) for output in engine.step()]
    assert {output.request_id for output in outputs} == {"next"}
    assert not engine.busy
    scheduler = engine._schedulers[0]
    assert (scheduler.running, scheduler.num_waiting, scheduler.pool.used) == ([], 0, 0)


def test_answers_to_one_prompt_are_those_of_seeds_one_after_another(make_engine):
    how = {"temperature": 1.5, "max_tokens": 8, "ignore_eos": True}
    outputs = serve(make_engine(), [[5, 6]], SamplingParams(n=3, seed=7, **how))[0]
    together = [tokens([o for o in outputs if o.index == i]) for i in range(3)]
    alone = serve(make_engine(), [[5, 6]] * 3, [SamplingParams(seed=7 + i, **how) for i in range(3)])
    assert together == [tokens(o) for o in alone]


def test_a_warm_engine_compiles_nothing_more_and_tells_how_far_it_is(make_engine):
    cfg, model = hf.load(GOLDENS / "qwen3")
    calls = []
    options = EngineConfig(**SIZE | {"warmup": True})
    engine = Engine(model, cfg, word_tokenizer(cfg.vocab_size), options, lambda *call: calls.append(call))
    assert sorted(set(calls)) == [(i, 10) for i in range(11)]  # 7 shapes of prefill, 2 of decode, and `mark`
    serve(engine, PROMPTS, DRAWN)
    serve(engine, [PROMPTS[2]], greedy(3, logprobs=2, prompt_logprobs=2, logit_bias={5: 1.0}, presence_penalty=1.0))
    assert (engine.counters.compiled, engine.counters.late_compiled) == (10, 0)


@pytest.mark.parametrize(("most", "rows"), [(0, 0), (3, 3), (2**40, SIZE["max_num_seqs"])])
def test_the_gate_of_guesses_is_as_the_options_say(make_engine, most, rows):
    gate = make_engine(speculation_entropy=0.5, speculation_max_seqs=most)._gate
    assert (float(gate.entropy), int(gate.rows)) == (0.5, rows)


def test_memory_is_that_of_the_weights_and_of_what_steps_keep(make_engine):
    memory = make_engine("qwen3").memory
    folder = GOLDENS / "qwen3"
    assert memory.weights == sum(t.read().size * 4 for t in hf.open_folder(folder).values())
    raw = hf.read_json(folder)
    rows = 2 * raw["num_key_value_heads"] * raw["head_dim"] * raw["num_hidden_layers"] * 4  # keys, values, float32
    cache = rows * SIZE["max_num_seqs"] * SIZE["max_model_len"]
    slots = SIZE["max_num_seqs"] * (4 * 4 + raw["vocab_size"] * (4 + 1 + 4))  # columns, and marks for each token
    assert memory.cache == cache + slots + 4  # and the load of the experts that it has not


def test_counters_add_up(make_engine):
    engine = make_engine("qwen3")
    count, c = 6, engine.counters
    prompt = list(range(2, 72))
    for known in (0, 64):
        before = c.prompt_tokens, c.cached_tokens, c.generated_tokens, c.decoded_rows, c.steps
        serve(engine, [prompt], greedy(count))
        after = c.prompt_tokens, c.cached_tokens, c.generated_tokens, c.decoded_rows, c.steps
        grown = [new - old for new, old in zip(after, before, strict=True)]
        assert grown[:4] == [len(prompt), known, count, count - 1]
        assert 2 <= grown[4] <= count + 1
    assert (c.running, c.waiting, c.pages_used, c.preemptions, c.accepted, c.tokens_per_row) == (0, 0, 0, 0, [], 1.0)


@pytest.mark.parametrize(("idle", "exposed"), [(True, 1 + 3 * 4), (False, 1)])
def test_the_host_s_time_is_split_and_what_the_device_waited_for_it_is_told(make_engine, monkeypatch, idle, exposed):
    engine = make_engine("qwen3")
    engine.add(Request("x", (5, 7), greedy(100)))
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)  # each look at it takes a second
    monkeypatch.setattr("jaxserve.engine.time", clock)
    last = SimpleNamespace(is_ready=lambda: idle, block_until_ready=lambda: None)
    monkeypatch.setattr(Launched, "last", last)
    monkeypatch.setattr(engine, "_rounds", lambda: 1)
    for _ in range(5):
        engine.step()
    c = engine.counters
    assert (c.schedule_seconds, c.device_seconds, c.read_seconds, c.step_seconds) == (5, 5, 5, 15)
    assert c.exposed_seconds == exposed  # all of the first step; then, of an idle device, from result to launch


def test_counters_of_the_moment_are_true_before_the_next_step(make_engine):
    engine = make_engine("qwen3")
    c = engine.counters
    for i in range(6):
        engine.add(Request(str(i), (5, 7), greedy(100)))
    assert (c.waiting, c.running, c.pages_used) == (6, 0, 0)
    engine.step()
    assert (c.waiting, c.running, c.pages_used) == (2, 4, 4)
    for i in range(6):
        engine.abort(str(i))
    assert (c.waiting, c.running, c.pages_used) == (0, 0, 0)


def test_scores_that_are_not_finite_end_their_request_and_no_other():
    cfg, model = hf.load(GOLDENS / "qwen3")
    broken = model._replace(embed=model.embed.at[9].set(jnp.nan))
    engine = Engine(broken, cfg, word_tokenizer(cfg.vocab_size), EngineConfig(**SIZE))
    bad, good = serve(engine, [[9], [5, 7]], greedy(3))
    assert (bad[-1].finish_reason, bad[-1].token_ids) == ("error", ())
    assert "scores are not finite" in bad[-1].error
    assert len(tokens(good)) == 3
