"""The n-gram baseline against a dictionary implementation written from the paper."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.checkpoints.embedded import ngram

VOCAB_SIZE = 7
BOS = 6
FALLBACK = [0.5, 1.0, 1.5]

documents_strategy = st.lists(st.lists(st.integers(0, VOCAB_SIZE - 2), max_size=12), min_size=0, max_size=6)


def as_arrays(documents):
    return [np.array(document, np.uint16) for document in documents]


def corpus(seed, documents=40, length=60):
    """A skewed random text: every count from 1 to 4 occurs at every order above the first."""
    rng = np.random.default_rng(seed)
    weights = 0.5 ** np.arange(VOCAB_SIZE - 1)
    sizes = rng.integers(0, length, documents)
    return [rng.choice(VOCAB_SIZE - 1, size=n, p=weights / weights.sum()).tolist() for n in sizes]


class SlowModel:
    """Chen and Goodman (1998), section 3, one n-gram tuple at a time."""

    def __init__(self, documents, order):
        texts = [(BOS, *document) for document in documents]
        self.order = order
        self.seen = Counter(
            text[end - size : end]
            for text in texts
            for size in range(1, order + 2)
            for end in range(size, len(text) + 1)
        )
        sizes = range(1, order + 1)
        self.counts = {size: self.count(size) for size in sizes}
        self.discounts = {size: self.discount(self.counts[size].values()) for size in sizes}

    def count(self, size):
        counts = Counter()
        for gram, occurrences in self.seen.items():
            if len(gram) == size and gram != (BOS,):
                raw = size == self.order or gram[0] == BOS
                befores = sum((before, *gram) in self.seen for before in range(VOCAB_SIZE))
                counts[gram] = occurrences if raw else befores
        return counts

    @staticmethod
    def discount(counts):
        n = Counter(counts)
        if not all(n[k] for k in (1, 2, 3, 4)):
            return FALLBACK
        y = n[1] / (n[1] + 2 * n[2])
        found = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
        return found if all(0 < d <= k for k, d in zip((1, 2, 3), found, strict=True)) else FALLBACK

    def probability(self, context, token):
        lower = self.probability(context[1:], token) if context else 1 / VOCAB_SIZE
        counts = self.counts[len(context) + 1]
        follow = [counts[(*context, other)] for other in range(VOCAB_SIZE)]
        if not sum(follow):
            return lower
        discounts = self.discounts[len(context) + 1]
        taken = [discounts[min(c, 3) - 1] if c else 0.0 for c in follow]
        return (follow[token] - taken[token] + sum(taken) * lower) / sum(follow)

    def log2_probabilities(self, document):
        text = [BOS, *document]
        reach = self.order - 1
        contexts = [tuple(text[max(0, i - reach) : i]) for i in range(1, len(text))]
        return [np.log2(self.probability(c, t)) for c, t in zip(contexts, document, strict=True)]


def last_probabilities(model, prefix):
    """The distribution after a prefix: [V]."""
    continued = as_arrays([*prefix, token] for token in range(model.vocab_size))
    return np.array([2.0 ** ngram.log2_probabilities(model, c)[-1] for c in continued])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_log_probabilities_equal_the_dictionary_implementation(order):
    train, held_out = corpus(seed=0), corpus(seed=1, documents=6)
    model = ngram.fit(as_arrays(train), VOCAB_SIZE, order, bos=BOS)
    slow = SlowModel(train, order)
    for document, array in zip(held_out, as_arrays(held_out), strict=True):
        got = ngram.log2_probabilities(model, array)
        np.testing.assert_allclose(got, slow.log2_probabilities(document), rtol=1e-12)


def test_the_compared_corpus_reaches_the_estimated_discounts():
    slow = SlowModel(corpus(seed=0), order=5)
    assert all(slow.discounts[size] != FALLBACK for size in (3, 4, 5))


@settings(max_examples=50, deadline=None)
@given(train=documents_strategy, document=documents_strategy.map(lambda d: sum(d, [])))
def test_any_small_corpus_equals_the_dictionary_implementation(train, document):
    model = ngram.fit(as_arrays(train), VOCAB_SIZE, order=3, bos=BOS)
    got = ngram.log2_probabilities(model, np.array(document, np.int32))
    np.testing.assert_allclose(got, SlowModel(train, order=3).log2_probabilities(document), rtol=1e-12)


def test_probabilities_sum_to_one_after_every_short_prefix():
    model = ngram.fit(as_arrays(corpus(seed=2, documents=8)), VOCAB_SIZE, bos=BOS)
    prefixes = [p for n in range(4) for p in product(range(VOCAB_SIZE), repeat=n)]
    sums = [last_probabilities(model, prefix).sum() for prefix in prefixes]
    np.testing.assert_allclose(sums, 1.0, rtol=1e-12)


def test_probabilities_sum_to_one_after_seen_and_unseen_contexts_of_a_full_vocabulary():
    rng = np.random.default_rng(3)
    text = rng.integers(0, 4095, 2000).astype(np.uint16)
    model = ngram.fit([text], 4096, bos=4095)
    for prefix in (text[500:504], rng.integers(0, 4095, 4)):
        np.testing.assert_allclose(last_probabilities(model, prefix).sum(), 1.0, rtol=1e-12)


def test_a_repeated_text_gets_cheaper():
    others, text = as_arrays(corpus(seed=4)), np.array([5, 4, 5, 3, 5, 2, 5, 1], np.uint16)
    models = [ngram.fit([*others, *[text] * n], VOCAB_SIZE, bos=BOS) for n in (0, 1, 2, 4)]
    bits = [-ngram.log2_probabilities(model, text).sum() for model in models]
    assert bits == sorted(bits, reverse=True) and bits[-1] < bits[0] / 2


def test_ngrams_do_not_cross_from_one_document_to_the_next():
    apart = as_arrays([[0, 1, 2], [3, 4, 5]])
    swapped = ngram.fit(apart[::-1], VOCAB_SIZE, bos=BOS)
    model = ngram.fit(apart, VOCAB_SIZE, bos=BOS)
    for table, other in zip(model.tables, swapped.tables, strict=True):
        np.testing.assert_array_equal(table.ngrams, other.ngrams)
        np.testing.assert_array_equal(table.discounted, other.discounted)


def test_a_corpus_with_very_many_rare_ngrams_can_be_fitted():
    text = np.random.default_rng(5).integers(0, 1023, 2_000_000).astype(np.uint16)
    model = ngram.fit([text], 1024, order=2, bos=1023)
    bits = -ngram.log2_probabilities(model, text[:100_000]).mean()
    assert 8 < bits < np.log2(1024)  # it knows its own training text


def test_an_empty_document_has_no_probabilities():
    model = ngram.fit(as_arrays([[0, 1]]), VOCAB_SIZE, bos=BOS)
    assert ngram.log2_probabilities(model, np.array([], np.uint16)).shape == (0,)


def test_an_order_that_does_not_fit_in_64_bits_is_refused():
    with pytest.raises(ValueError, match=r"order must be in \[1, 4\]"):
        ngram.fit(as_arrays([[0, 1]]), vocab_size=8193, order=5, bos=0)


@pytest.mark.parametrize("document", [[0, VOCAB_SIZE], [-1, 0]])
def test_an_id_outside_the_vocabulary_is_refused(document):
    with pytest.raises(ValueError, match=r"ids must be in \[0, 7\)"):
        ngram.fit([np.array(document, np.int32)], VOCAB_SIZE, bos=BOS)
