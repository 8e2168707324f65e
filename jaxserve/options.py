"""How much an engine holds, and how it goes about it."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax

from jaxserve.layers.config import Config, LatentAttention
from jaxserve.layers.transformer import cache_params
from jaxserve.parallel.errors import RequestError
from jaxserve.parallel.ranks import Exchange

CacheDtype = Literal["auto", "int8"]
"""Of the cache: that of activations, or INT8 for latents."""

MAX_DRAFTS = 8
MAX_MICROBATCHES = 2
_LEAST = {
    "max_num_seqs": 1,
    "max_model_len": 2,
    "max_num_batched_tokens": 16,
    "max_num_queued": 0,
    "page_size": 1,
    "num_pages": 1,
    "cache_bytes": 1,
    "num_speculative_tokens": 0,
    "speculation_max_seqs": 0,
    "num_redundant_experts": 0,
    "num_shared_expert_ranks": 0,
    "num_microbatches": 1,
    "seed": 0,
}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The options of an engine, by vLLM's names where it has one.

    None changes a token that is generated, but the seed and `kv_cache_dtype`.

    On a mesh, answers, pages and bytes are those of each device; prompts' tokens are those of a step of all together.

    max_num_seqs            answers that are generated together
    max_model_len           tokens of a prompt and its answer; None: the model's positions, at most 8192
    max_num_batched_tokens  tokens of a step; longer prompts are cut into chunks
    max_num_queued          answers that may wait besides those that run; None: any number
    enable_prefix_caching   what was computed for a prompt serves others that begin alike
    page_size               tokens of a page of the cache
    num_pages               None: what all answers need at their longest, if `cache_bytes` hold that
    cache_bytes             of all pages together, at most
    kv_cache_dtype          "auto", that of activations; "int8": latents in INT8, a scale a token, keys in 16 bits
    num_speculative_tokens  guesses a step; None: 1 if the model has an MTP module, but 0 on CPU
    speculation_entropy     guesses less sure than this, in nats, are not verified; of no effect on a mesh
    speculation_max_seqs    in steps for more answers, guesses are neither verified nor made
    num_redundant_experts   on a mesh, slots for replicas of experts, besides those that fill up the ranks
    num_shared_expert_ranks on a mesh, the first ranks that hold copies of the shared expert and no others
    expert_exchange         how ranks exchange tokens: "flat", or "hierarchical": within nodes, then between them
    num_microbatches        on a mesh, 2: steps in two parts, so that one's exchange can overlap with the other's work
    warmup                  compile all steps at the start, rather than each when it is first needed
    seed                    of the seeds of requests that have none
    """

    max_num_seqs: int = 8
    max_model_len: int | None = None
    max_num_batched_tokens: int = 512
    max_num_queued: int | None = None
    enable_prefix_caching: bool = True
    page_size: int = 64
    num_pages: int | None = None
    cache_bytes: int = 4 << 30
    kv_cache_dtype: CacheDtype = "auto"
    num_speculative_tokens: int | None = None
    speculation_entropy: float = 2.0
    speculation_max_seqs: int = 32
    num_redundant_experts: int = 0
    num_shared_expert_ranks: int = 0
    expert_exchange: Exchange = "flat"
    num_microbatches: int = 1
    warmup: bool = True
    seed: int = 0

    def __post_init__(self):
        for name, least in _LEAST.items():
            value, optional = getattr(self, name), EngineConfig.__dataclass_fields__[name].default is None
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not whole and not (optional and value is None):
                raise RequestError(f"{name} = {value!r}: it must be a whole number, {least} or more")
        if (self.num_speculative_tokens or 0) > MAX_DRAFTS:
            raise RequestError(
                f"num_speculative_tokens = {self.num_speculative_tokens}: it must be at most {MAX_DRAFTS}"
            )
        if self.num_microbatches > MAX_MICROBATCHES:
            raise RequestError(f"num_microbatches = {self.num_microbatches}: it must be at most {MAX_MICROBATCHES}")
        for name in ("enable_prefix_caching", "warmup"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} = {getattr(self, name)!r}: it must be True or False")
        for name, kinds in {"kv_cache_dtype": get_args(CacheDtype), "expert_exchange": get_args(Exchange)}.items():
            if getattr(self, name) not in kinds:
                raise RequestError(f"{name} = {getattr(self, name)!r}: it must be one of {', '.join(kinds)}")
        nats = self.speculation_entropy
        if not isinstance(nats, int | float) or isinstance(nats, bool) or not nats >= 0:
            raise RequestError(f"speculation_entropy = {nats!r}: it must be a number of nats, 0 or more")


def check(cfg: Config, options: EngineConfig, dtype: Any) -> None:
    """Raises RequestError if the model can't be served so."""
    drafts(cfg, options)
    num_pages(cfg, options, dtype)


def model_len(cfg: Config, options: EngineConfig) -> int:
    """The most tokens a prompt and its answer can have."""
    wanted = options.max_model_len
    if wanted is None:
        return min(cfg.max_positions, 8192)
    if wanted > cfg.max_positions:
        raise RequestError(f"max_model_len = {wanted}: it must be from 2 to {cfg.max_positions}, the model's positions")
    return wanted


def drafts(cfg: Config, options: EngineConfig) -> int:
    """Guesses a step. By default none on CPU, where a guess costs more than it brings (`benchmarks/speculation.py`)."""
    wanted = options.num_speculative_tokens
    if wanted and not cfg.mtp_layers:
        raise RequestError(f"num_speculative_tokens = {wanted}: the model has no MTP module; it must be 0")
    if wanted is None:
        return 0 if jax.default_backend() == "cpu" else min(1, cfg.mtp_layers)
    return wanted


def cache_of(cfg: Config, options: EngineConfig, pages: int, dtype: Any) -> tuple[Any, ...]:
    """The tree of `Param` of a cache of so many pages."""
    int8 = options.kv_cache_dtype == "int8"
    if int8 and not isinstance(cfg.attention, LatentAttention):
        raise RequestError(
            "kv_cache_dtype = 'int8': the model's attention is grouped-query and has no latents; it must be 'auto'"
        )
    return cache_params(cfg, pages, options.page_size, dtype, int8=int8)


def num_pages(cfg: Config, options: EngineConfig, dtype: Any) -> int:
    """Pages of the cache: at least what one answer needs at its longest."""
    longest = -(-model_len(cfg, options) // options.page_size)
    page_bytes = sum(p.nbytes for p in jax.tree.leaves(cache_of(cfg, options, 1, dtype)))
    if options.num_pages is None:
        return max(longest, min(longest * options.max_num_seqs, options.cache_bytes // page_bytes))
    if options.num_pages < longest:
        raise RequestError(
            f"num_pages = {options.num_pages}: it must be at least {longest}, to hold one answer of max_model_len "
            f"{model_len(cfg, options)} in pages of {options.page_size} tokens"
        )
    return options.num_pages
