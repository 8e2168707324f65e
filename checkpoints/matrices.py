"""A layer's matrices, all in one form, and what enters them: what is rounded, and what its error is measured with.

A matrix is `[e, f, d]`: one for each expert, outputs, inputs. What is no mixture has a single expert, and the heads of
attention are outputs or inputs. What enters it is `[e, t, d]`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.layers.attention import Gqa, gqa_heads
from jaxserve.layers.batch import Batch
from jaxserve.layers.config import Config, GroupedAttention, LatentAttention
from jaxserve.layers.dims import Leaf
from jaxserve.layers.linear import einsum
from jaxserve.layers.mla import Mla, compressed, mla_heads
from jaxserve.layers.moe import Mlp, Moe, route
from jaxserve.layers.norm import rms_norm
from jaxserve.layers.transformer import Layer, attention_output, extend_cache, network_output
from jaxserve.parallel.qarray import QArray

Matrices = Mapping[str, Leaf]
"""By name: `attn.w_uq`, `ffn.w_up`, `ffn.experts.w_down`, `ffn.shared.w_gate`, …; `[e, f, d]`, or codes and scales."""

BLOCKS = ("attn", "ffn")
"""What stands between a layer's residual sums."""

_ATTENTION = ("w_dq", "w_uq", "w_dkv", "w_kr", "w_q", "w_k", "w_v", "w_o")  # without w_uk and w_uv: see `layers.int8`


class Sample(NamedTuple):
    """What passed through a layer, and what it made of it before anything was rounded."""

    states_td: Array
    batch: Batch  # whole sequences
    cache: Any  # empty pages for them
    middle_td: Array  # the states after attention
    outputs: dict[str, Array]  # what each block adds to the states, `[t, d]`

    @property
    def after_td(self) -> Array:
        """The states that the next layer gets."""
        return self.middle_td + self.outputs["ffn"]


def sample(p: Layer, states_td: Float[Array, "t d"], batch: Batch, cache: Any, cfg: Config) -> Sample:
    """Runs a layer over whole sequences."""
    attended_td = _attention(p, states_td, batch, cache, cfg)
    middle_td = states_td + attended_td
    return Sample(states_td, batch, cache, middle_td, {"attn": attended_td, "ffn": _network(p, middle_td, cfg)})


def output(p: Layer, block: str, found: Sample, cfg: Config) -> Float[Array, "t d"]:
    """What a block of the layer, as it is now, adds to the states that passed through it."""
    if block == "attn":
        return _attention(p, found.states_td, found.batch, found.cache, cfg)
    return _network(p, found.middle_td, cfg)


def matrices(p: Layer, block: str) -> dict[str, Leaf]:
    """The matrices of a block."""
    return {name: _as_matrix(name, w) for name, w in _leaves(p, block).items()}


def with_matrices(p: Layer, changed: Matrices) -> Layer:
    """The layer with other matrices."""
    shapes = {name: w.shape for block in BLOCKS for name, w in _leaves(p, block).items()}
    for name, w in changed.items():
        p = replace_at(p, name, _as_leaf(name, w, shapes[name]))
    return p


def replace_at(tree: Any, path: str, leaf: Leaf) -> Any:
    """The tree with another leaf at a path like `ffn.experts.w_up`."""
    field, _, rest = path.partition(".")
    return tree._replace(**{field: replace_at(getattr(tree, field), rest, leaf) if rest else leaf})


def networks(p: Layer) -> dict[str, Mlp]:
    """The gated networks of a layer by name; those of experts are one."""
    if not isinstance(p.ffn, Moe):
        return {"ffn": p.ffn}
    shared = {} if p.ffn.shared is None else {"ffn.shared": p.ffn.shared}
    return {"ffn.experts": p.ffn.experts, **shared}


def inputs(p: Layer, block: str, found: Sample, cfg: Config, rows: int) -> dict[str, Array]:
    """What enters the matrices of a block.

    Into an expert, the tokens whose router chose it; if they are fewer than `rows`, then those that came nearest to it,
    if more, those most of all.
    """
    if block == "attn":
        return _attention_inputs(p, found, cfg)
    return _network_inputs(p, found.middle_td, cfg, min(rows, len(found.middle_td)))


@partial(jax.jit, static_argnames="cfg")
def expert_load(p: Layer, x_td: Float[Array, "t d"], cfg: Config) -> Int[Array, " e"]:
    """How many tokens choose each expert of a mixture."""
    assert cfg.experts
    experts_tk = route(cast(Moe, p.ffn), rms_norm(x_td, p.ffn_norm, cfg.norm_eps), cfg.experts).experts_tk
    return jnp.zeros(cfg.experts.count, jnp.int32).at[experts_tk].add(1)


@partial(jax.jit, static_argnames="cfg")
def _attention(p: Layer, x_td: Array, batch: Batch, cache: Any, cfg: Config) -> Array:
    return attention_output(p, x_td, extend_cache(p, x_td, cache, batch, cfg), batch, cfg)


@partial(jax.jit, static_argnames="cfg")
def _network(p: Layer, x_td: Array, cfg: Config) -> Array:
    return network_output(p, x_td, jnp.ones(len(x_td), bool), cfg)[0]


@partial(jax.jit, static_argnames="cfg")
def _attention_inputs(p: Layer, found: Sample, cfg: Config) -> dict[str, Array]:
    x_td, batch = found.states_td, found.batch
    normed_td = rms_norm(x_td, p.attn_norm, cfg.norm_eps)
    cache = extend_cache(p, x_td, found.cache, batch, cfg)
    entering = {name: normed_td for name in _leaves(p, "attn")}
    match p.attn, cfg.attention:
        case Mla() as latent, LatentAttention() as att:
            entering["attn.w_uq"] = compressed(latent, normed_td)
            heads_thv = mla_heads(latent, normed_td, cache, batch, cfg, att)
        case Gqa() as grouped, GroupedAttention() as att:
            heads_thv = gqa_heads(grouped, normed_td, cache, batch, cfg, att)
        case _:
            raise TypeError(f"weights are {type(p.attn).__name__}, the config has {type(cfg.attention).__name__}")
    entering["attn.w_o"] = heads_thv.reshape(len(x_td), -1)
    return {name: x[None] for name, x in entering.items()}


@partial(jax.jit, static_argnames=("cfg", "rows"))
def _network_inputs(p: Layer, x_td: Array, cfg: Config, rows: int) -> dict[str, Array]:
    normed_td, entering = rms_norm(x_td, p.ffn_norm, cfg.norm_eps), {}
    for at, net in networks(p).items():
        chosen = (
            _nearest(cast(Moe, p.ffn), normed_td, cfg, rows) if at == "ffn.experts" else jnp.arange(len(x_td))[None]
        )
        x_etd = normed_td[chosen]
        gate_etf, up_etf = (einsum("etd,efd->etf", x_etd, _as_matrix("", w)) for w in (net.w_gate, net.w_up))
        entering |= {f"{at}.w_gate": x_etd, f"{at}.w_up": x_etd, f"{at}.w_down": jax.nn.silu(gate_etf) * up_etf}
    return entering


def _nearest(p: Moe, x_td: Array, cfg: Config, rows: int) -> Int[Array, "e t"]:
    """The tokens nearest to each expert: first those whose router chose it, each by how much."""
    assert cfg.experts
    logits_te = jnp.einsum("td,ed->te", x_td.astype(jnp.float32), p.w_router.astype(jnp.float32))
    experts_tk = route(p, x_td, cfg.experts).experts_tk
    chosen_te = jnp.zeros(logits_te.shape, bool).at[jnp.arange(len(x_td))[:, None], experts_tk].set(True)
    ahead = jnp.ptp(logits_te) + 1
    return jax.lax.top_k(jnp.where(chosen_te, logits_te + ahead, logits_te).T, rows)[1]


def _leaves(p: Layer, block: str) -> dict[str, Leaf]:
    if block == "attn":
        found = {f"attn.{name}": getattr(p.attn, name, None) for name in _ATTENTION}
        return {name: w for name, w in found.items() if w is not None}
    return {f"{at}.{name}": w for at, net in networks(p).items() for name, w in net._asdict().items()}


def _as_matrix(name: str, w: Array) -> Array:
    """A weight as `[e, f, d]`: of attention the last axis is the inputs, but the first the outputs of `w_o`."""
    if name == "attn.w_o":
        return w.reshape(1, w.shape[0], -1)
    return w if w.ndim == 3 and not name.startswith("attn") else w.reshape(1, -1, w.shape[-1])


def _as_leaf(name: str, w: Leaf, shape: tuple[int, ...]) -> Leaf:
    if not isinstance(w, QArray):
        return w.reshape(shape)
    outputs = 1 if name == "attn.w_o" else len(shape) - 1
    return QArray(w.codes.reshape(shape), w.scale.reshape(*shape[:outputs], *(1,) * (len(shape) - outputs)))
