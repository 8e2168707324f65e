import math

import numpy as np
import pytest

from jaxserve import evaluate
from jaxserve.checkpoints.evaluation.scoring import likelihoods
from jaxserve.checkpoints.evaluation.statistics import Parts
from jaxserve.checkpoints.evaluation.suite import Evaluation, Measured, chosen_tasks, compare
from jaxserve.checkpoints.evaluation.tasks import Item
from jaxserve.parallel.errors import CheckpointError
from tests.jaxserve.conftest import EMBEDDED_SIZE, engine, greedy, loaded, serve


def kind(scoring, values, choices: int = 4) -> Measured:
    parts = Parts([str(i % 7) for i in range(len(values))], values, [1.0] * len(values))
    return Measured(scoring, "f", parts, [[-1.0] * choices] * len(values))


ONE = Evaluation(
    {"model": "A", "dtype": "bfloat16", "quantization": "int8", "python": "3.12.1"},
    {
        "perplexity": kind("bits", [1.0, 2.0] * 7, 1),
        "next-token": kind("tokens", [0.5] * 14, 1),
        "keyword": kind("sum", [1.0, 0.0] * 7),
    },
)
OTHER = Evaluation({"model": "B"}, ONE.tasks | {"keyword": kind("sum", [1.0] * 14)})


def test_what_follows_is_as_probable_as_an_engine_that_echoes_a_prompt_says():
    cfg, model, tokenizer, *_ = loaded("embedded")
    context = "import os\n\n\ndef size(path):\n    return os.path."
    items = [Item("m", context, ("getsize(path)", "join(path)", "exists(path)"), 0), Item("m", context[:9], ("\n",), 0)]
    rows = [[tokenizer.encode(item.context + choice) for choice in item.choices] for item in items]
    prompts = [row for each in rows for row in each]
    assert max(map(len, prompts)) < EMBEDDED_SIZE["max_model_len"]
    echoed = serve(engine("embedded", 0), prompts, greedy(1, prompt_logprobs=0))
    known = [next(output.prompt_logprobs for output in outputs if output.prompt_logprobs) for outputs in echoed]
    found = [one for each in likelihoods(model, cfg, tokenizer.encode, items) for one in each]
    for row, logprobs, one in zip(prompts, known, found, strict=True):
        nats = [logprobs[place][row[place]].logprob for place in range(len(row) - one.tokens, len(row))]
        np.testing.assert_allclose(one.log2 * math.log(2), math.fsum(nats), rtol=1e-4)


def test_a_model_without_an_embedding_for_a_token_is_refused(tiny_folder, tmp_path):
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"t96":96', '"t96":97').replace('"t96": 96', '"t96": 97'))
    with pytest.raises(CheckpointError, match="tokenizer.json has 98 tokens, config.json has a vocab_size of 97"):
        evaluate.evaluate(str(tmp_path), "float32", None, chosen_tasks(["keyword"]), 1, lambda *_: None)


def test_rows_have_scores_in_their_units_with_intervals():
    perplexity, next_token, keyword = evaluate.score_rows(ONE)
    assert (perplexity[:2], next_token[:4]) == (("perplexity", "1.5000"), ("next-token", "50.0", "50.0", "50.0"))
    assert keyword == ("keyword", "50.0", "26.8", "73.2", "25", "14", "7")
    assert all(len(row) == len(evaluate.SCORES) for row in (perplexity, next_token, keyword))


def test_rows_of_two_models_have_differences_with_signs_and_the_answers_that_changed():
    rows = evaluate.difference_rows(ONE, OTHER, compare(ONE, OTHER))
    assert rows[0][:6] == ("perplexity", "1.5000", "1.5000", "+0.0000", "+0.0000", "+0.0000")
    assert rows[0][6:] == ("", "", "")
    assert rows[2][:4] == ("keyword", "50.0", "100.0", "-50.0") and rows[2][6:] == ("0", "7", "0.016")
    assert all(len(row) == len(evaluate.DIFFERENCES) for row in rows)


def test_an_interval_without_ends_is_left_out():
    single = Evaluation({}, {"perplexity": kind("bits", [1.0], 1)})
    assert evaluate.score_rows(single) == [("perplexity", "1.0000", "", "", "", "1", "1")]


def test_titles_and_notes_say_what_was_measured():
    assert evaluate.title(ONE) == "A, bfloat16, matrices in INT8, Python 3.12.1"
    assert evaluate.note(ONE).startswith("perplexity in bits per byte; of a token it is 2.828;")
    assert "of a token it is 2.828 and 2.828;" in evaluate.note(ONE, OTHER)
    keyword = Evaluation({}, {"keyword": ONE.tasks["keyword"]})
    assert evaluate.note(keyword).startswith("perplexity in bits per byte; all else")
