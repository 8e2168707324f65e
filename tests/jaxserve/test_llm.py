import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, CheckpointError, ConfigError, RequestError, SamplingParams
from jaxserve.checkpoints import store
from jaxserve.checkpoints.hub import EMBEDDED
from tests.jaxserve.conftest import EMBEDDED_SHAPES, EMBEDDED_SIZE, GOLDENS, SIZE, with_few_shapes

pytestmark = pytest.mark.xdist_group("embedded")  # compiled in one process

GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPTS = ["def quicksort(items):", "import os\nimport", "class Node:\n    def __init__(self"]


def serving(model: Any = None, dtype: str = "float32", **options: Any) -> LLM:
    llm = LLM(model, dtype=dtype, **EMBEDDED_SIZE | options)
    with_few_shapes(llm.engine, EMBEDDED_SHAPES)
    return llm


@pytest.fixture(scope="module")
def llm():
    return serving()


def test_the_embedded_model_continues_text(llm):
    results = llm.generate(PROMPTS, GREEDY)
    assert [r.prompt for r in results] == PROMPTS
    assert all(r.finished and r.outputs[0].text for r in results)
    for r in results:
        assert llm.tokenizer.decode(r.outputs[0].token_ids) == r.outputs[0].text


def test_one_prompt_needs_no_list_and_tokens_are_as_good_as_text(llm):
    (as_text,) = llm.generate(PROMPTS[0], GREEDY)
    (as_tokens,) = llm.generate(llm.tokenizer.encode(PROMPTS[0]), GREEDY)
    assert as_text.outputs[0] == as_tokens.outputs[0]
    assert as_tokens.prompt is None


def test_streaming_gives_the_same_text_piece_by_piece(llm, monkeypatch):
    monkeypatch.setattr(llm.engine, "_rounds", lambda: 1)  # else as many as the machine is fast enough for
    (whole,) = llm.generate(PROMPTS[0], GREEDY)
    pieces = list(llm.stream(PROMPTS[0], GREEDY))
    assert "".join(p.text for p in pieces) == whole.outputs[0].text
    assert [t for p in pieces for t in p.token_ids] == whole.outputs[0].token_ids
    assert len(pieces) > 5


def test_a_stream_that_is_dropped_frees_its_slots(llm):
    for _ in range(3):
        stream = llm.stream(PROMPTS * 3, SamplingParams(temperature=0, max_tokens=200))
        next(stream)
        stream.close()
    assert not llm.engine.busy


def test_a_stop_text_ends_the_answer(llm):
    (whole,) = llm.generate(PROMPTS[0], GREEDY)
    stop = whole.outputs[0].text[5:9]
    (cut,) = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=24, stop=stop))
    assert cut.outputs[0].text == whole.outputs[0].text.split(stop)[0]
    assert cut.outputs[0].stop_reason == stop


def test_each_prompt_may_have_its_own_params(llm):
    results = llm.generate(PROMPTS[:2], [SamplingParams(temperature=0, max_tokens=n) for n in (3, 5)])
    assert [len(r.outputs[0].token_ids) for r in results] == [3, 5]
    with pytest.raises(RequestError, match="2 prompts and 3 sampling_params"):
        llm.generate(PROMPTS[:2], [GREEDY] * 3)


def test_each_prompt_may_have_its_own_priority_the_lower_comes_first(llm):
    asked = llm._requests(PROMPTS[:2], GREEDY, [3, -1])
    assert [request.priority for request in asked] == [3, -1]
    many = [PROMPTS[0]] * 40  # more than run together
    order = [int(o.request_id) for o in llm.stream(many, GREEDY, priority=[*range(40, 0, -1)]) if o.finish_reason]
    assert order[0] > order[-1]
    for wrong, message in ((1.5, "priority must be int"), ([1], "2 prompts and 1 priority")):
        with pytest.raises(RequestError, match=message):
            llm.generate(PROMPTS[:2], GREEDY, priority=wrong)


def test_nothing_is_generated_if_one_prompt_can_not_be_served(llm):
    with pytest.raises(RequestError, match="prompt has"):
        llm.generate(["fine", [5] * 600], GREEDY)
    assert not llm.engine.busy


def test_an_empty_prompt_is_begun_by_the_model_s_own_token_and_an_empty_list_is_refused(llm):
    assert llm.generate("", GREEDY)[0].prompt_token_ids == [llm.tokenizer.bos_id]
    with pytest.raises(RequestError, match="no tokens"):
        llm.generate([[]], GREEDY)


def test_logprobs_come_with_every_token(llm):
    (result,) = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=5, logprobs=2))
    answer = result.outputs[0]
    assert len(answer.logprobs) == 5
    for token, found in zip(answer.token_ids, answer.logprobs, strict=True):
        assert found[token].rank == 1
        assert len(found) == 2


def test_chat_renders_the_model_s_template(llm):
    (result,) = llm.chat([{"role": "user", "content": "def add(a, b):"}], GREEDY)
    assert result.prompt_token_ids[0] == llm.tokenizer.bos_id
    assert result.outputs[0].text
    with pytest.raises(RequestError, match="messages"):
        llm.chat([], GREEDY)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="dtype 'int3' is not supported; supported: auto, float32"):
        LLM(dtype="int3")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "is no folder here, and no name on the hub"),
        ("./nowhere", "is no folder here"),
        (str(EMBEDDED / "config.json"), "is a file; name the folder"),
    ],
)
def test_a_model_that_is_not_there_is_named(name, message):
    with pytest.raises(CheckpointError, match=message):
        LLM(name)


def test_a_checkpoint_of_our_own_gives_the_same_text(llm, tmp_path):
    store.save(tmp_path / "saved", llm.engine._model, EMBEDDED)
    again = serving(tmp_path / "saved")
    assert again.generate(PROMPTS, GREEDY)[0].outputs == llm.generate(PROMPTS, GREEDY)[0].outputs


def test_sixteen_bits_work_on_cpu(tiny_folder):
    llm = LLM(tiny_folder, dtype="bfloat16", **SIZE)
    with_few_shapes(llm.engine)
    assert llm.engine._model.embed.dtype == jnp.bfloat16
    assert llm.generate(["t5 t7", "t3"], GREEDY)[0].outputs[0].text


def test_a_checkpoint_without_a_tokenizer_says_so():
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        LLM(GOLDENS / "qwen3")


def test_a_stream_that_ends_in_the_middle_of_a_step_does_not_wait_for_its_end(llm, monkeypatch):
    """The garbage collector may do that, in the thread that is in the step."""
    expected, step = llm.generate(PROMPTS[0], GREEDY), llm.engine.step
    dropped = llm.stream(PROMPTS[1], SamplingParams(temperature=0, max_tokens=200))
    next(dropped)

    def close_and_step():
        dropped.close()
        return step()

    monkeypatch.setattr(llm.engine, "step", close_and_step)
    assert llm.generate(PROMPTS[0], GREEDY)[0].outputs == expected[0].outputs
    assert not llm.engine.busy


def test_streams_that_take_turns_get_their_own_text(llm):
    alone = [r.outputs[0].text for r in llm.generate(PROMPTS[:2], GREEDY)]
    streams, texts = [llm.stream(p, GREEDY) for p in PROMPTS[:2]], ["", ""]
    for pieces in itertools.zip_longest(*streams):
        texts = [text + (piece.text if piece else "") for text, piece in zip(texts, pieces, strict=True)]
        llm.generate("x", SamplingParams(temperature=0, max_tokens=1))
    assert texts == alone


def test_threads_may_share_a_model(llm):
    alone = [r.outputs[0].text for r in llm.generate(PROMPTS, GREEDY)]
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(lambda p: llm.generate(p, GREEDY)[0].outputs[0].text, PROMPTS)) == alone


def test_prompts_may_be_vllm_s_dicts_and_arrays(llm):
    ids = llm.tokenizer.encode(PROMPTS[0])
    prompts = [{"prompt": PROMPTS[0]}, {"prompt_token_ids": ids}, np.array(ids)]
    assert len({r.outputs[0].text for r in llm.generate(prompts, GREEDY)}) == 1


@pytest.mark.parametrize("prompt", [None, 5.0, b"abc", {1, 2}, [1.0], [True], {"text": "x"}, {"prompt": 3}, [None]])
def test_what_is_no_prompt_is_refused(llm, prompt):
    with pytest.raises(RequestError, match="a prompt must be text, token ids"):
        llm.generate([prompt], GREEDY)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDENS / "qwen3" / name, tmp_path)
    shutil.copy(EMBEDDED / "tokenizer.json", tmp_path)
    with pytest.raises(CheckpointError, match="tokenizer.json has 4096 tokens, config.json has a vocab_size of 97"):
        LLM(tmp_path)


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    """One of whose tokens, 9, the scores are not finite."""
    llm = LLM(tiny_folder, **SIZE)
    with_few_shapes(llm.engine)
    llm.engine._model = llm.engine._model._replace(embed=llm.engine._model.embed.at[9].set(jnp.nan))
    return llm


def test_a_request_that_fails_leaves_the_answers_of_the_others(tiny):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logit_bias={9: -100})
    expected = tiny.generate([[5, 7], [3]], params)
    found = tiny.generate([[5, 7], [6, 9], [3]], params)
    assert [found[0].outputs, found[2].outputs] == [result.outputs for result in expected]
    (failed,) = found[1].outputs
    assert (failed.finish_reason, failed.token_ids, failed.text) == ("error", [], "")
    assert "scores are not finite" in failed.error
    assert all(result.finished for result in found)
    assert not tiny.engine.busy


def test_after_a_step_that_fails_the_caller_is_told_and_the_model_goes_on(tiny, monkeypatch):
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, logit_bias={9: -100})
    (before,) = tiny.generate([[5, 7, 11]], params)
    other = tiny.stream([[5, 8]], params)
    next(other)
    with monkeypatch.context() as patch:
        patch.setattr(tiny.engine, "_launch", lambda plans: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.generate([[5, 7, 11]], params)
    assert [output.finish_reason for output in other][-1] == "error"
    (after,) = tiny.generate([[5, 7, 11]], params)
    assert after.outputs == before.outputs


def test_a_stream_s_request_ids_are_the_numbers_of_its_prompts(tiny):
    for _ in range(2):
        pieces = list(tiny.stream([[5, 7], [3], [2, 4]], SamplingParams(temperature=0, max_tokens=3, n=2)))
        assert {(p.request_id, p.index) for p in pieces} == {(id, i) for id in "012" for i in range(2)}
        assert sorted(p.request_id for p in pieces if p.finish_reason) == ["0", "0", "1", "1", "2", "2"]


def test_a_prompt_may_have_several_answers(tiny):
    params = SamplingParams(n=3, temperature=1.5, seed=3, max_tokens=5, ignore_eos=True, logit_bias={9: -100})
    results = tiny.generate([[5, 7], [3]], params)
    for result in results:
        assert [answer.index for answer in result.outputs] == [0, 1, 2]
        assert all(len(answer.token_ids) == 5 for answer in result.outputs)
        assert len({tuple(answer.token_ids) for answer in result.outputs}) == 3
    one = replace(params, n=1, seed=4)
    assert tiny.generate([[5, 7]], one)[0].outputs[0].token_ids == results[0].outputs[1].token_ids


def test_prompts_that_the_queue_has_no_room_for_are_refused_with_those_before_them(tiny, monkeypatch):
    scheduler = tiny.engine._schedulers[0]
    slots = scheduler.limits.slots
    monkeypatch.setattr(scheduler, "limits", scheduler.limits._replace(queued=2))
    with pytest.raises(RequestError, match=f"{slots + 2} answers wait, of 2 that may besides {slots} that can start"):
        tiny.generate([[5, 7]] * (slots + 3), GREEDY)
    assert not tiny.engine.busy
    assert scheduler.num_waiting == 0
