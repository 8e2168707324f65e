"""The engine of one device: prompts wait, are prefilled in chunks, and decode together, each in a slot of its own."""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.completion import Completion, ends
from jaxserve.layers.batch import Batch
from jaxserve.layers.config import Config
from jaxserve.layers.dims import AnyArray
from jaxserve.layers.sampling import Sampling
from jaxserve.layers.transformer import Model, cache_params
from jaxserve.parallel.errors import RequestError
from jaxserve.parallel.sharding import zeros
from jaxserve.request import MAX_LOGPROBS, Logprob, Output, Request, SamplingParams
from jaxserve.steps import Chosen, Rows, decode, prefill
from jaxserve.tokenizer import Tokenizer

PAGE_SIZE = 64
MAX_ENDS = 16
"""Tokens that may end an answer: the model's own and the request's."""
CHUNKS = (32, 128, 512)
"""Sizes of a prefill chunk: a prompt is cut into the largest, its end goes into the smallest that holds it."""


class Running(NamedTuple):
    """A request with a slot."""

    request: Request
    completion: Completion


@dataclass(frozen=True)
class EngineConfig:
    """How much the engine holds."""

    max_num_seqs: int = 8  # sequences that decode together
    max_model_len: int | None = None  # tokens of a prompt and its answer; None: the model's positions, at most 8192
    seed: int = 0  # of the seeds of requests that have none


class Engine:
    """Serves requests in the order they come; `Serving` says what its methods promise."""

    def __init__(self, model: Model, cfg: Config, tokenizer: Tokenizer, options: EngineConfig = EngineConfig()):
        self.cfg = cfg
        self.max_model_len = _max_model_len(cfg, options)
        if options.max_num_seqs < 1:
            raise RequestError(f"max_num_seqs = {options.max_num_seqs}: it must be 1 or more")
        self._model, self._tokenizer = model, tokenizer
        self._eos_ids = frozenset([*cfg.eos_ids, *tokenizer.eos_ids])
        self._seeds = np.random.default_rng(options.seed)
        pages = -(-self.max_model_len // PAGE_SIZE)
        dtype = model.embed.dtype
        self._cache = zeros(cache_params(cfg, options.max_num_seqs * pages, PAGE_SIZE, dtype))
        self._pages = np.arange(options.max_num_seqs * pages, dtype=np.int32).reshape(-1, pages)
        self._waiting: deque[Request] = deque()
        self._slots: list[Running | None] = [None] * options.max_num_seqs
        self._rows = _empty_rows(self._pages)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights on the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._model))

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache on the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._cache))

    def check(self, request: Request) -> None:
        tokens, stops = request.prompt_token_ids, request.params.stop_token_ids
        if not tokens:
            raise RequestError("the prompt has no tokens; give at least one (a begin-of-text token, say)")
        if len(tokens) >= self.max_model_len:
            raise RequestError(
                f"prompt has {len(tokens)} tokens; this engine accepts {self.max_model_len - 1} "
                f"(max_model_len {self.max_model_len} less one). Raise max_model_len, or shorten the prompt."
            )
        if len(ends(request, self._eos_ids)) > MAX_ENDS:
            room = MAX_ENDS - len(self._eos_ids)
            raise RequestError(f"stop_token_ids has {len(stops)} tokens; it must have at most {room}")
        for name, ids in (("prompt_token_ids", tokens), ("stop_token_ids", stops)):
            wrong = [t for t in ids if not 0 <= t < self.cfg.vocab_size]
            if wrong:
                raise RequestError(f"{name} has {wrong[0]}; the model's tokens are 0 to {self.cfg.vocab_size - 1}")

    def add(self, request: Request) -> None:
        self.check(request)
        self._waiting.append(request)

    def abort(self, request_id: str) -> None:
        self._waiting = deque(r for r in self._waiting if r.id != request_id)
        for slot, running in enumerate(self._slots):
            if running and running.request.id == request_id:
                self._free(slot)

    def step(self) -> list[Output]:
        outputs = []
        while self._waiting and None in self._slots:
            outputs.append(self._start(self._waiting.popleft(), self._slots.index(None)))
        busy = [slot for slot, running in enumerate(self._slots) if running]
        return outputs + (self._decode(busy) if busy else [])

    def _start(self, request: Request, slot: int) -> Output:
        """Prefills a prompt and chooses its first token."""
        room = self.max_model_len - len(request.prompt_token_ids)
        running = Running(request, Completion(request, self._tokenizer.stream(), self._eos_ids, room))
        self._slots[slot] = running
        _write_row(self._rows, slot, request, self._eos_ids, self._seeds)
        chosen = self._prefill(request, _part(self._rows, slice(slot, slot + 1)))
        self._rows.tokens_s[slot] = np.asarray(chosen.tokens_s)[0]
        return self._advance(slot, chosen, row=0)

    def _prefill(self, request: Request, row: Rows) -> Chosen:
        tokens, done = request.prompt_token_ids, 0
        while True:
            size = min(len(tokens) - done, CHUNKS[-1])
            chunk = _chunk(tokens[done : done + size], done, row.pages_sp)
            last = jnp.int32(size - 1)
            row = row._replace(positions_s=np.array([done + size - 1], np.int32))
            chosen, self._cache = prefill(
                self._model, chunk, last, row, self._cache, cfg=self.cfg, top=self._top([request])
            )
            done += size
            if done == len(tokens):
                return chosen

    def _decode(self, busy: list[int]) -> list[Output]:
        """One token for every slot in use; computes the smallest power of two of slots that holds them."""
        size = min(1 << busy[-1].bit_length(), len(self._slots)) if busy[-1] else 1
        top = self._top([running.request for running in self._slots if running])
        rows = _part(self._rows, slice(0, size))
        chosen, self._cache = decode(self._model, rows, self._cache, cfg=self.cfg, top=top)
        self._rows.tokens_s[busy] = np.asarray(chosen.tokens_s)[busy]
        return [self._advance(slot, chosen, row=slot) for slot in busy]

    def _top(self, requests: list[Request]) -> int | None:
        """How many log-probabilities a step reports: all that may be asked for or none, for a program each."""
        wanted = any(request.params.logprobs is not None for request in requests)
        return min(MAX_LOGPROBS, self.cfg.vocab_size) if wanted else None

    def _advance(self, slot: int, chosen: Chosen, row: int) -> Output:
        """Hands the slot's new token to its answer; the slot is free again if that ends it."""
        running = self._slots[slot]
        assert running is not None
        request, completion = running
        if not bool(chosen.finite_s[row]):
            self._free(slot)
            fault = "the model's scores are not finite; its weights may be damaged"
            return Output(request.id, "", (), (), "error", fault)
        self._rows.positions_s[slot] = len(request.prompt_token_ids) + completion.count
        output = completion.push(int(chosen.tokens_s[row]), self._logprobs(request.params, chosen, row))
        if output.finish_reason:
            self._free(slot)
        return output

    def _logprobs(self, params: SamplingParams, chosen: Chosen, row: int) -> dict[int, Logprob] | None:
        if params.logprobs is None or chosen.logprobs is None:
            return None
        sampled, rank, top, ids = (np.asarray(a)[row] for a in chosen.logprobs)
        found = {int(chosen.tokens_s[row]): (float(sampled), int(rank))}
        for place, (token, value) in enumerate(zip(ids[: params.logprobs], top, strict=False), start=1):
            found.setdefault(int(token), (float(value), place))
        return {t: Logprob(value, place, self._tokenizer.decode([t], False)) for t, (value, place) in found.items()}

    def _free(self, slot: int) -> None:
        self._slots[slot] = None
        self._rows.positions_s[slot] = -1


def _max_model_len(cfg: Config, options: EngineConfig) -> int:
    wanted = options.max_model_len
    if wanted is None:
        return min(cfg.max_positions, 8192)
    if not 2 <= wanted <= cfg.max_positions:
        raise RequestError(f"max_model_len = {wanted}: it must be from 2 to {cfg.max_positions}, the model's positions")
    return wanted


def _chunk(tokens: tuple[int, ...], start: int, pages_1p: AnyArray) -> Batch:
    """A tile of a prompt, padded to one of the sizes in CHUNKS."""
    size = next(c for c in CHUNKS if c >= len(tokens))
    padding = size - len(tokens)
    positions = np.arange(start, start + len(tokens), dtype=np.int32)
    return Batch(
        np.pad(np.asarray(tokens, np.int32), (0, padding)),
        np.pad(positions, (0, padding), constant_values=-1),
        np.zeros(1, np.int32),
        pages_1p,
    )


def _empty_rows(pages_sp: np.ndarray) -> Rows:
    """Rows on the host, written in place as requests come and go."""
    s = pages_sp.shape[0]
    zero = lambda dtype: np.zeros(s, dtype)  # noqa: E731
    sampling = Sampling(zero(np.float32), zero(np.int32), zero(np.float32), zero(np.float32), zero(np.uint32))
    ends_sk = np.full((s, MAX_ENDS), -1, np.int32)
    return Rows(zero(np.int32), np.full(s, -1, np.int32), pages_sp, sampling, ends_sk, zero(np.int32))


def _write_row(rows: Rows, slot: int, request: Request, eos_ids: frozenset[int], seeds: np.random.Generator) -> None:
    p, how = request.params, rows.sampling
    seed = p.seed if p.seed is not None else int(seeds.integers(2**32))
    for column, value in zip(how, (p.temperature, p.top_k, p.top_p, p.min_p, seed), strict=True):
        column[slot] = value
    last = sorted(ends(request, eos_ids))
    rows.ends_sk[slot] = -1
    rows.ends_sk[slot, : len(last)] = last
    rows.first_end_s[slot] = len(request.prompt_token_ids) + p.min_tokens


def _part(rows: Rows, which: slice) -> Rows:
    """Copies, because the device may still read them when the rows change."""
    return jax.tree.map(lambda column: column[which].copy(), rows)
