"""Multi-token prediction (arXiv:2412.19437, section 2.2): a layer that guesses the token after the next."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.layers.batch import Batch, Rows, pick
from jaxserve.layers.config import Config
from jaxserve.layers.dims import AnyArray
from jaxserve.layers.linear import einsum
from jaxserve.layers.norm import rms_norm
from jaxserve.layers.transformer import Model, Mtp, extend_cache, layer_outputs, microbatches
from jaxserve.parallel.ranks import Ranks


class Draft(NamedTuple):
    """What an MTP module computes."""

    hidden_td: Float[Array, "t d"]  # of the wanted rows, normed: for the head, and for the module to draft one further
    cache: Any
    load_e: Int[Array, " e"] | None


@jax.named_scope("draft")
def draft(
    model: Model, mtp: Mtp, hidden_td: Float[Array, "t d"], batch: Batch, cache: Any, cfg: Config,
    wanted: Rows | None = None, ranks: Ranks | None = None,
) -> Draft:  # fmt: skip
    """Joins the hidden state at a position with the embedding of the next token; the result predicts the one after.

    `batch.tokens_t` holds the *next* tokens: for a row with the hidden state of position i, the token of position
    i + 1, and i in `positions_t`. `cache` is the module's own: it gains the entries of all rows, whichever results are
    `wanted`.

    The state is the one after the model's last norm, and the embedding comes first, as in published serving code
    (the paper's eq. 21 writes them the other way round).
    """
    x_td = join(model, mtp, hidden_td, batch.tokens_t, cfg)
    cache = extend_cache(mtp.layer, x_td, cache, batch, cfg)
    if wanted is not None:
        x_td, batch = jnp.take(x_td, wanted.index_s, axis=0, mode="clip"), pick(batch, wanted)
    return draft_from(mtp, x_td, batch, cache, cfg, ranks)


def draft_from(
    mtp: Mtp, x_td: Float[Array, "t d"], batch: Batch, cache: Any, cfg: Config, ranks: Ranks | None
) -> Draft:
    """What the module's layer computes of joined states, whose entries the cache has; microbatches side by side.

    No entry of a single layer waits for its exchange, so all may be written before.
    """
    parts = microbatches(batch, ranks)
    ends = itertools.accumulate(len(part.tokens_t) for part in parts[:-1])
    states = tuple(jnp.split(x_td, list(ends)))
    states, load_e = layer_outputs(mtp.layer, states, [cache] * len(parts), parts, cfg, ranks)
    return Draft(rms_norm(jnp.concatenate(states), mtp.norm, cfg.norm_eps), cache, load_e)


@jax.named_scope("draft")
def follow(model: Model, mtp: Mtp, hidden_td: Float[Array, "t d"], batch: Batch, cache: Any, cfg: Config) -> Any:
    """The module's cache after `draft`, if no result is wanted."""
    return extend_cache(mtp.layer, join(model, mtp, hidden_td, batch.tokens_t, cfg), cache, batch, cfg)


def join(model: Model, mtp: Mtp, hidden_td: Array, tokens_t: AnyArray, cfg: Config) -> Float[Array, "t d"]:
    """What the module's layer computes from: hidden states, and the embeddings of the tokens that follow them."""
    return einsum("tz,dz->td", joined(mtp, model.embed[tokens_t], hidden_td, cfg), mtp.w_join)


def joined(mtp: Mtp, embedded_td: Array, hidden_td: Array, cfg: Config) -> Float[Array, "t z"]:
    """Embeddings and hidden states side by side, each normed."""
    norms = (embedded_td, mtp.embed_norm), (hidden_td, mtp.hidden_norm)
    return jnp.concatenate([rms_norm(x_td, gain, cfg.norm_eps) for x_td, gain in norms], axis=-1)
