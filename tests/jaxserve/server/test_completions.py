"""What becomes of an output, without a server."""

from jaxserve.request import Logprob, Output, Request, SamplingParams
from jaxserve.server.completions import CompletionCall
from jaxserve.server.protocol import CompletionRequest
from tests.jaxserve.conftest import word_tokenizer


def test_of_candidates_that_look_alike_the_most_probable_is_told():
    body = CompletionRequest(prompt="t1", logprobs=2)
    call = CompletionCall("x", "m", body, [Request("x-0", (1,), SamplingParams())], word_tokenizer(9), only_echo=False)
    half, other = Logprob(-0.5, 1, "\ufffd"), Logprob(-3.0, 3, "\ufffd")
    scores = {3: Logprob(-2.0, 2, "t3"), 4: half, 5: other}
    (choice,) = call.grow(0, Output("x-0", 0, "t3", (3,), (scores,), "length"))
    assert choice.logprobs.top_logprobs == [{"\ufffd": -0.5, "t3": -2.0}]
    assert choice.logprobs.token_logprobs == [-2.0]
