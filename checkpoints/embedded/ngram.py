"""An interpolated n-gram language model over token ids, the baseline of the embedded model.

Modified Kneser-Ney smoothing, interpolated at every order and ending in the uniform distribution:
Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (Harvard
TR-10-98, 1998), section 3.

An n-gram is one uint64 key: each id takes the bits of the largest id, the newest id the lowest
bits. So dropping the newest id (the context) is a shift, dropping the oldest (the n-gram one order
lower) is a mask, and a table sorted by key is also sorted by context.

A document is preceded by one BOS, as it is for the neural model. Its token at index i (0-based) has
a context of at most i + 1 ids, so the orders above i + 2 take no part in its probability.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Floats = NDArray[np.float64]

FALLBACK_DISCOUNTS = np.array([0.0, 0.5, 1.0, 1.5])  # for counts 0, 1, 2, 3 and more; as in KenLM


class Table(NamedTuple):
    """One order. Of G distinct n-grams and C distinct contexts, keys ascending."""

    ngrams: Keys  # [G]
    discounted: Floats  # [G] (count - discount) / total count of the context
    contexts: Keys  # [C]; the empty context of order 1 is the key 0
    backoff: Floats  # [C] probability left to the next lower order


class NgramModel(NamedTuple):
    """Everything `log2_probabilities` needs; about 32 bytes an n-gram."""

    tables: tuple[Table, ...]  # order 1 first
    vocab_size: int
    bos: int


class _Stream(NamedTuple):
    """T ids: the documents end to end, each preceded by its BOS."""

    keys: Keys  # [T] the highest-order n-gram ending here; may reach back before the BOS
    positions: NDArray[np.int64]  # [T] index in the document, the BOS being 0


class _Counts(NamedTuple):
    ngrams: Keys  # [G] ascending
    counts: NDArray[np.int64]  # [G]


def fit(documents: Sequence[NDArray[np.integer]], vocab_size: int, order: int = 5, *, bos: int) -> NgramModel:
    """Fits a model to documents of ids in [0, vocab_size), given without their BOS.

    Raises ValueError for an id outside the vocabulary and if `order` ids do not fit in 64 bits
    (for order 5: vocab_size <= 4096).
    """
    bits = _bits(vocab_size)
    if not 1 <= order <= 64 // bits:
        raise ValueError(
            f"order must be in [1, {64 // bits}], that many ids of vocabulary size {vocab_size} "
            f"fit in 64 bits. Got {order}."
        )
    stream = _stream(documents, vocab_size, order, bos)
    counted = _count_occurrences(stream, order)
    tables = [_table(counted, bits)]
    for lower in range(order - 1, 0, -1):
        counted = _count_continuations(stream, counted, lower, bits)
        tables.append(_table(counted, bits))
    return NgramModel(tuple(reversed(tables)), vocab_size, bos)


def log2_probabilities(model: NgramModel, document: NDArray[np.integer]) -> Floats:
    """Log2 of the probability of each token given those before it and the BOS: [N] -> [N], bits.

    For any context, seen in training or not, the probabilities over the vocabulary sum to one and
    none is zero.
    """
    bits = _bits(model.vocab_size)
    stream = _stream([document], model.vocab_size, len(model.tables), model.bos)
    keys, positions = stream.keys[1:], stream.positions[1:]
    probabilities = np.full(len(keys), 1.0 / model.vocab_size)
    for order, table in enumerate(model.tables, start=1):
        reached = _interpolate(table, keys & _mask(order, bits), probabilities, bits)
        probabilities = np.where(positions >= order - 1, reached, probabilities)
    return np.log2(probabilities)


def _bits(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def _mask(order: int, bits: int) -> np.uint64:
    return np.uint64((1 << order * bits) - 1)


def _stream(documents: Sequence[NDArray[np.integer]], vocab_size: int, order: int, bos: int) -> _Stream:
    """Packs every position of every document; raises ValueError for an id out of range."""
    opening = np.full(1, bos)
    ids = np.concatenate([opening[:0], *(part for d in documents for part in (opening, d))])
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"ids must be in [0, {vocab_size}). Got {ids.min()} to {ids.max()}.")
    ids = ids.astype(np.uint64)
    keys = ids.copy()
    for back in range(1, order):
        keys[back:] |= ids[:-back] << np.uint64(back * _bits(vocab_size))
    lengths = np.array([len(document) + 1 for document in documents], np.int64)
    starts = np.cumsum(lengths) - lengths
    return _Stream(keys, np.arange(len(ids)) - np.repeat(starts, lengths))


def _count_occurrences(stream: _Stream, order: int) -> _Counts:
    """Counts of the highest order: how often each n-gram occurs within a document."""
    # The BOS is never predicted, hence position 1 at least.
    complete = stream.positions >= max(order - 1, 1)
    return _Counts(*np.unique(stream.keys[complete], return_counts=True))


def _count_continuations(stream: _Stream, higher: _Counts, order: int, bits: int) -> _Counts:
    """Counts of a lower order: after how many different ids each n-gram occurs.

    Nothing comes before a BOS, so n-grams that begin with it keep their number of occurrences.
    """
    mask = _mask(order, bits)
    continuations = higher.ngrams & mask
    if order == 1:
        return _Counts(*np.unique(continuations, return_counts=True))
    openings = stream.keys[stream.positions == order - 1] & mask
    return _Counts(*np.unique(np.concatenate([continuations, openings]), return_counts=True))


def _discounts(counts: NDArray[np.int64]) -> Floats:
    """What to subtract from a count of 0, 1, 2, and 3 or more: [4]. Chen and Goodman, section 3.

    Small or regular corpora lack one of the counts 1 to 4, or give a discount out of (0, count];
    they get the fallback.
    """
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5]
    if min(n1, n2, n3, n4) == 0:
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    allowed = (discounts[1:] > 0) & (discounts[1:] <= [1, 2, 3])
    return discounts if allowed.all() else FALLBACK_DISCOUNTS


def _table(counted: _Counts, bits: int) -> Table:
    """Discounts the counts and gives each context the mass this takes from its n-grams."""
    ngrams, counts = counted
    contexts = ngrams >> np.uint64(bits)
    starts = np.flatnonzero(np.diff(contexts, prepend=~contexts[:1]))
    taken = _discounts(counts)[np.minimum(counts, 3)]
    totals = np.add.reduceat(counts, starts)
    sizes = np.diff(starts, append=len(ngrams))
    return Table(
        ngrams=ngrams,
        discounted=(counts - taken) / np.repeat(totals, sizes),
        contexts=contexts[starts],
        backoff=np.add.reduceat(taken, starts) / totals,
    )


def _interpolate(table: Table, keys: Keys, lower: Floats, bits: int) -> Floats:
    """Probabilities [N] at one order, given those at the next lower one [N]."""
    backoff = _look_up(table.contexts, table.backoff, keys >> np.uint64(bits), missing=1.0)
    return _look_up(table.ngrams, table.discounted, keys, missing=0.0) + backoff * lower


def _look_up(keys: Keys, values: Floats, queries: Keys, missing: float) -> Floats:
    """The value of each query in a table sorted by key: [N] -> [N]."""
    if not len(keys):  # every document is shorter than this order
        return np.full(len(queries), missing)
    nearest = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[nearest] == queries, values[nearest], missing)
