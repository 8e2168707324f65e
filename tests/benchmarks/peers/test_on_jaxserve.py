import pytest

from benchmarks.peers.on_jaxserve import answering
from jaxserve.parallel.errors import EngineError
from jaxserve.request import Logprob, Output


class Staggered:
    """An engine whose answers begin one step after another, and say 10, 11, … then."""

    def __init__(self, error=None):
        self.waiting, self.running, self.error = [], {}, error

    @property
    def busy(self):
        return bool(self.waiting or self.running)

    def add(self, request):
        self.waiting.append(request)

    def step(self):
        if self.waiting:
            self.running[self.waiting.pop(0)] = 0
        outputs = []
        for request, said in list(self.running.items()):
            self.running[request] += 1
            last, token = said + 1 == request.params.max_tokens, 10 + said
            scores = () if request.params.logprobs is None else ({token: Logprob(-0.5, 1, "")},)
            reason = "error" if self.error else "length" if last else None
            outputs.append(
                Output(request.id, token_ids=(token,), logprobs=scores, finish_reason=reason, error=self.error)
            )
            if last:
                del self.running[request]
        return outputs


def test_decode_counts_while_all_answers_go_on():
    answer = answering(Staggered())
    found = answer([[1, 2], [3, 4]], 5, True)
    assert found.tokens == [[10, 11, 12, 13, 14]] * 2
    assert found.logprobs == [[-0.5] * 5] * 2
    assert found.decode_tokens == 6  # steps three to five, of six
    assert found.prefill_seconds > 0 and found.decode_seconds > 0
    assert answer([[1]], 2, False).logprobs == [[]]


def test_an_answer_that_fails_is_not_measured():
    with pytest.raises(EngineError, match="an answer failed: out of memory"):
        answering(Staggered(error="out of memory"))([[1]], 2, False)
