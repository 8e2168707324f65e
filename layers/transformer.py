"""The whole model as functions of its weights, a step's tokens and the cache."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxserve.layers.attention import Gqa, KeyValueCache, gqa, gqa_cache, gqa_params, keys_values
from jaxserve.layers.batch import Batch, Fresh, Positions, divide, once_read, write
from jaxserve.layers.config import Config, GroupedAttention, LatentAttention
from jaxserve.layers.dims import AnyArray, Leaf
from jaxserve.layers.linear import einsum
from jaxserve.layers.mla import LatentCache, Mla, latents, mla, mla_cache, mla_params
from jaxserve.layers.moe import Mlp, Moe, Spread, mlp, mlp_params, moe, moe_params
from jaxserve.layers.norm import rms_norm
from jaxserve.parallel.ranks import Ranks
from jaxserve.parallel.sharding import Param, unsplit

States = tuple[Array, ...]
"""Of tokens on their way through the layers, `[t, d]` for each microbatch."""


class Layer(NamedTuple):
    """A decoder layer."""

    attn_norm: Leaf  # d   input_layernorm
    attn: Mla | Gqa
    ffn_norm: Leaf  # d    post_attention_layernorm
    ffn: Mlp | Moe
    attn_bias: Leaf | None = None  # d   of quantized layers: what rounding took from the mean of attention's output
    ffn_bias: Leaf | None = None  # d    the same of the network's


class Mtp(NamedTuple):
    """A multi-token prediction module (arXiv:2412.19437, section 2.2); it shares the model's embedding and head."""

    embed_norm: Leaf  # d    enorm
    hidden_norm: Leaf  # d   hnorm
    w_join: Leaf  # d (2d)   eh_proj: of the embedding, then of the hidden state
    layer: Layer
    norm: Leaf  # d          shared_head.norm


class Model(NamedTuple):
    """All weights."""

    embed: Leaf  # u d         embed_tokens
    layers: tuple[Layer, ...]
    norm: Leaf  # d            norm
    head: Leaf | None  # u d   lm_head; None: the embedding serves
    mtp: tuple[Mtp, ...]


class Output(NamedTuple):
    """What a step computes before any token is chosen."""

    hidden_td: Float[Array, "t d"]  # normed: what the head and the MTP module read
    cache: tuple[Any, ...]
    load_le: Int[Array, "l e"]  # tokens each expert got, padding left out; one row per mixture layer


def model_params(cfg: Config, dtype: Any = jnp.float32, spread: Spread | None = None, biases: bool = False) -> Model:
    """The tree of `Param` that describes the model's weights; their experts over ranks, if they have so much room.

    With `biases`, layers have those of a model that was quantized with compensation.
    """
    layer = partial(_layer_params, cfg, dtype=dtype, spread=spread, biases=biases)
    embedding = Param((cfg.vocab_size, cfg.width), ("u", "d"), dtype, std=cfg.width**-0.5)
    gain = Param((cfg.width,), ("d",), dtype, mean=1.0)
    return Model(
        embed=embedding,
        layers=tuple(layer(is_moe) for is_moe in cfg.is_moe),
        norm=gain,
        head=None if cfg.tied_embeddings else embedding,
        mtp=tuple(_mtp_params(cfg, dtype, layer(cfg.experts is not None)) for _ in range(cfg.mtp_layers)),
    )


def _layer_params(cfg: Config, is_moe: bool, dtype: Any, spread: Spread | None, biases: bool) -> Layer:
    gain = Param((cfg.width,), ("d",), dtype, mean=1.0)
    att, experts = cfg.attention, cfg.experts
    attn = mla_params(cfg, att, dtype) if isinstance(att, LatentAttention) else gqa_params(cfg, att, dtype)
    mixture = moe_params(cfg, experts, dtype, spread) if is_moe and experts else None
    bias = Param((cfg.width,), ("d",)) if biases else None
    return Layer(gain, attn, gain, mixture or mlp_params(cfg.width, cfg.dense_width, dtype), bias, bias)


def _mtp_params(cfg: Config, dtype: Any, layer: Layer) -> Mtp:
    gain = Param((cfg.width,), ("d",), dtype, mean=1.0)
    join = Param((cfg.width, 2 * cfg.width), ("d", None), dtype, std=(2 * cfg.width) ** -0.5)
    layer = layer._replace(attn=unsplit(layer.attn, "h"))  # of a prompt only last tokens pass it, where they belong
    return Mtp(gain, gain, join, layer, gain)


def has_biases(model: Model) -> bool:
    """Whether the layers of a model, or of its `Param`, have biases: all do, or none does."""
    return model.layers[0].attn_bias is not None


def cache_params(
    cfg: Config, pages: int, page_size: int, dtype: Any = jnp.float32, *, int8: bool = False
) -> tuple[Any, ...]:
    """The tree of `Param` of the paged cache: one entry a layer, the MTP layers' last. `int8` is for latents alone."""
    att, size = cfg.attention, (pages, page_size, dtype)
    layer = mla_cache(att, *size, int8) if isinstance(att, LatentAttention) else gqa_cache(att, *size)
    return (layer,) * (cfg.layers + cfg.mtp_layers)


def forward(model: Model, batch: Batch, cache: tuple[Any, ...], cfg: Config, ranks: Ranks | None = None) -> Output:
    """Runs a step's tokens through the layers; the cache gains their entries. MTP layers' caches pass unchanged.

    With `ranks`, inside a `shard_map`, each has its own batch and cache, and some of the experts. In microbatches, no
    two tiles may belong to one sequence.
    """
    parts = microbatches(batch, ranks)
    run = partial(decoder_layer, parts=parts, cfg=cfg, ranks=ranks)
    return through_layers(model, [part.tokens_t for part in parts], cache, run, cfg)


def microbatches(batch: Batch, ranks: Ranks | None) -> tuple[Batch, ...]:
    """The parts of a step that ranks compute side by side; on a single device it is one."""
    return divide(batch, ranks.microbatches if ranks else 1)


def through_layers(
    model: Model, tokens: Sequence[AnyArray], cache: tuple[Any, ...], run: Callable[..., Any], cfg: Config
) -> Output:
    """Embeds the tokens of each microbatch, and lets `run(layer, states, cache)` give each layer's states, cache, load.

    Between layers the microbatches stay apart: one waits for another only where both end.
    """
    states, caches, loads = tuple(model.embed[tokens_t] for tokens_t in tokens), list(cache), []
    for i, layer in enumerate(model.layers):
        states, caches[i], load_e = run(layer, states, caches[i])
        if load_e is not None:
            loads.append(load_e)
    load_le = jnp.stack(loads) if loads else jnp.zeros((0, 0), jnp.int32)
    return Output(rms_norm(jnp.concatenate(states), model.norm, cfg.norm_eps), tuple(caches), load_le)


@partial(jax.jit, static_argnames=("cfg", "ranks"))  # traced once for all layers of a kind, in half the time
def decoder_layer(
    p: Layer, states: States, cache: Any, parts: tuple[Batch, ...], cfg: Config, ranks: Ranks | None = None
) -> tuple[States, Any, Int[Array, " e"] | None]:
    """Adds the tokens' entries to the cache, and lets them see it: their new states, the cache and the load.

    Of several microbatches, each sees the cache as it was, and its own entries beside it. If it saw all that is
    written, it would wait for the others' entries, and so for their exchange in the layer before.
    """
    if len(parts) == 1:
        cache = extend_cache(p, states[0], cache, parts[0], cfg)
        states, load_e = layer_outputs(p, states, [cache], parts, cfg, ranks)
        return states, cache, load_e
    fresh = [Fresh(cache, rows) for rows in each(partial(entries, p, cfg=cfg), states, parts)]
    states, load_e = layer_outputs(p, states, fresh, parts, cfg, ranks)
    cache = once_read(cache, states)
    for (_, rows), batch in zip(fresh, parts, strict=True):
        cache = write(cache, rows, batch)
    return states, cache, load_e


def each(run: Callable[..., Any], *given: Sequence[Any]) -> list[Any]:
    """What `run` gives for each microbatch; a compiled program's names tell which of them an operation is for."""
    results, several = [], len(given[0]) > 1
    for number, arguments in enumerate(zip(*given, strict=True)):
        with jax.named_scope(f"microbatch{number}") if several else nullcontext():
            results.append(run(*arguments))
    return results


@jax.named_scope("attention")
def extend_cache(p: Layer, x_td: Float[Array, "t d"], cache: Any, batch: Batch, cfg: Config) -> Any:
    """The cache of a layer with what its attention keeps of these tokens."""
    return write(cache, entries(p, x_td, batch, cfg), batch)


@jax.named_scope("attention")
def entries(p: Layer, x_td: Float[Array, "t d"], batch: Positions, cfg: Config) -> LatentCache | KeyValueCache:
    """What a layer's attention keeps of tokens."""
    normed_td = rms_norm(x_td, p.attn_norm, cfg.norm_eps)
    if isinstance(p.attn, Mla):
        return latents(p.attn, normed_td, batch, cfg)
    return keys_values(p.attn, normed_td, batch, cfg)


def layer_outputs(
    p: Layer, states: States, caches: Sequence[Any], parts: tuple[Batch, ...], cfg: Config, ranks: Ranks | None
) -> tuple[States, Int[Array, " e"] | None]:
    """`layer_output` of each microbatch; the load is that of all."""
    found = each(partial(layer_output, p, cfg=cfg, ranks=ranks), states, caches, parts)
    return tuple(x_td for x_td, _ in found), total_load([load_e for _, load_e in found])


def total_load(loads: Sequence[Int[Array, " e"] | None]) -> Int[Array, " e"] | None:
    """The experts' load of all; None if there are no experts."""
    counted = [load_e for load_e in loads if load_e is not None]
    return sum(counted[1:], counted[0]) if counted else None


def layer_output(
    p: Layer, x_td: Float[Array, "t d"], cache: Any, batch: Batch, cfg: Config, ranks: Ranks | None = None
) -> tuple[Float[Array, "t d"], Int[Array, " e"] | None]:
    """Attention to a cache that has the tokens' own entries, or to a `Fresh` one; then the feed-forward network.

    The second result is the experts' load, None if there are none.
    """
    x_td = x_td + attention_output(p, x_td, cache, batch, cfg)
    return feed_forward(p, x_td, batch.positions_t >= 0, cfg, ranks)


@jax.named_scope("attention")
def attention_output(p: Layer, x_td: Float[Array, "t d"], cache: Any, batch: Batch, cfg: Config) -> Float[Array, "t d"]:
    """What attention adds to the states."""
    return compensate(_attention(p.attn, rms_norm(x_td, p.attn_norm, cfg.norm_eps), cache, batch, cfg), p.attn_bias)


def compensate(y_td: Float[Array, "t d"], bias: Leaf | None) -> Float[Array, "t d"]:
    """A block's output with what rounding took from its mean, if that was measured."""
    return y_td if bias is None else y_td + bias.astype(y_td.dtype)[None]


def feed_forward(
    p: Layer, x_td: Float[Array, "t d"], valid_t: Bool[AnyArray, " t"], cfg: Config, ranks: Ranks | None = None
) -> tuple[Float[Array, "t d"], Int[Array, " e"] | None]:
    """The states after a layer's network or mixture, and the experts' load."""
    y_td, load_e = network_output(p, x_td, valid_t, cfg, ranks)
    return x_td + y_td, load_e


def network_output(
    p: Layer, x_td: Float[Array, "t d"], valid_t: Bool[AnyArray, " t"], cfg: Config, ranks: Ranks | None = None
) -> tuple[Float[Array, "t d"], Int[Array, " e"] | None]:
    """What a layer's network or mixture adds to the states, and the experts' load."""
    normed_td, load_e = rms_norm(x_td, p.ffn_norm, cfg.norm_eps), None
    if isinstance(p.ffn, Moe) and cfg.experts:
        y_td, load_e = moe(p.ffn, normed_td, valid_t, cfg.experts, ranks)
    else:
        y_td = mlp(cast(Mlp, p.ffn), normed_td)
    return compensate(y_td, p.ffn_bias), load_e


def _attention(p: Mla | Gqa, x_td: Array, cache: Any, batch: Batch, cfg: Config) -> Float[Array, "t d"]:
    match p, cfg.attention:
        case Mla() as latent, LatentAttention() as att:
            return mla(latent, x_td, cache, batch, cfg, att)
        case Gqa() as grouped, GroupedAttention() as att:
            return gqa(grouped, x_td, cache, batch, cfg, att)
    raise TypeError(f"weights are {type(p).__name__}, the config has {type(cfg.attention).__name__}")


@jax.named_scope("head")
def logits(model: Model, hidden_td: Float[Array, "t d"]) -> Float[Array, "t u"]:
    """Scores of the next token, float32, for normed hidden states."""
    head = model.embed if model.head is None else model.head
    return einsum("td,ud->tu", hidden_td, head).astype(jnp.float32)
