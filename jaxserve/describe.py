"""What a model is, in rows of text: for `jaxserve info`."""

from collections.abc import Iterable
from typing import Any

import jax

from jaxserve.layers.config import Config, LatentAttention
from jaxserve.layers.moe import Moe
from jaxserve.layers.transformer import Model, model_params
from jaxserve.options import CacheDtype, EngineConfig, cache_of

Row = tuple[str, str]


def architecture(cfg: Config) -> list[Row]:
    """Sizes of the model, one a row."""
    att = cfg.attention
    if isinstance(att, LatentAttention):
        query = f"query latent {att.query_rank}" if att.query_rank else "query not compressed"
        heads = f"latent: {att.heads} heads ({att.nope_dim} + {att.rope_dim} rotated, value {att.value_dim}), "
        heads += f"key/value latent {att.kv_rank}, {query}"
    else:
        heads = f"grouped: {att.heads} query heads, {att.kv_heads} key/value heads of {att.head_dim}"
    rows = [
        ("layers", f"{cfg.layers}: {cfg.layers - sum(cfg.is_moe)} dense, {sum(cfg.is_moe)} mixtures of experts"),
        ("width", f"{cfg.width}, dense feed-forward {cfg.dense_width}"),
        ("attention", heads),
    ]
    if moe := cfg.experts:
        shared = f", shared {moe.shared_width}" if moe.shared_width else ""
        rows.append(("experts", f"{moe.count} of {moe.width}, {moe.per_token} a token{shared}; {moe.router} router"))
    yarn = cfg.rope.yarn
    positions = f"{cfg.max_positions:,}, rope theta {cfg.rope.theta:g}"
    rows.append(("positions", positions + (f", YaRN x{yarn.factor:g} of {yarn.original_positions:,}" if yarn else "")))
    rows.append(("vocabulary", f"{cfg.vocab_size:,}{', embedding and head tied' if cfg.tied_embeddings else ''}"))
    rows.append(("MTP layers", str(cfg.mtp_layers)))
    return rows


def parts(cfg: Config) -> list[Row]:
    """Parameters by part, and how many of them a token uses."""
    model = model_params(cfg)
    ffns = [layer.ffn for layer in model.layers]
    mixtures = [f for f in ffns if isinstance(f, Moe)]
    experts = count(f.experts for f in mixtures)
    rows = {
        "embedding": count(model.embed),
        "head": count(model.head),
        "attention": count(layer.attn for layer in model.layers),
        "dense feed-forward": count(f for f in ffns if not isinstance(f, Moe)),
        "routed experts": experts,
        "shared experts": count(f.shared for f in mixtures),
        "routers and norms": 0,
        "MTP": count(model.mtp),
    }
    total = count(model)
    rows["routers and norms"] = total - sum(rows.values())
    idle = experts * (1 - cfg.experts.per_token / cfg.experts.count) if cfg.experts else 0
    active = total - rows["MTP"] - int(idle)
    shown = [(name, f"{n:,}") for name, n in rows.items() if n]
    return [*shown, ("total", f"{total:,}"), ("used by a token, without MTP", f"{active:,}")]


def memory(cfg: Config, dtype: Any, params: Model | None = None, *, kv_cache_dtype: CacheDtype = "auto") -> list[Row]:
    """Bytes of the weights, and of the cache for a token and for the longest sequence.

    `params` describe the weights, by default in floats.
    """
    weights = sum(p.nbytes for p in jax.tree.leaves(params or model_params(cfg, dtype)))
    options = EngineConfig(page_size=1, kv_cache_dtype=kv_cache_dtype)
    token = sum(p.nbytes for p in jax.tree.leaves(cache_of(cfg, options, 1, dtype)))
    return [
        ("weights", human(weights)),
        ("cache of a token", human(token)),
        (f"cache of {cfg.max_positions:,} tokens", human(token * cfg.max_positions)),
    ]


def count(tree: Iterable[Any] | Any) -> int:
    """Parameters in a tree of `Param`, or in an iterable of such trees."""
    return sum(p.size for p in jax.tree.leaves(list(tree) if isinstance(tree, Iterable) else tree))


def human(size: float) -> str:
    """A number of bytes with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.4g} {unit}"
        size /= 1024
    return f"{size:,.4g} TiB"
