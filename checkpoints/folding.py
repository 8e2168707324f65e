"""Transformations that leave a layer's function as it is, and make it easier to round.

What they put into one weight they take out of another, so nothing is added to what is computed. Scales are powers of
two: dividing by them is exact.

- Rescaling moves the range of inputs, whose largest channels take all codes, into the weights that read them
  (SmoothQuant, arXiv:2211.10438; searched: AWQ, arXiv:2306.00978; arXiv:2506.12708, section 4.5).
- Rotations spread what is large in a channel over many (QuaRot, arXiv:2404.00456): of latents, whose norm they pass
  unchanged once its gain is in the weights behind it, and of values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxserve.checkpoints.matrices import Sample, inputs, matrices, networks, replace_at, with_matrices
from jaxserve.checkpoints.rounding import product_error
from jaxserve.layers.attention import Gqa
from jaxserve.layers.config import Config
from jaxserve.layers.moe import Moe
from jaxserve.layers.transformer import Layer

SHARES = np.arange(0.2, 0.95, 0.1)
"""How much of the inputs' range moves into the weights: 0.5 makes both alike."""

SMOOTHING = 0.5


class Pair(NamedTuple):
    """Matrices whose inputs can be rescaled, and what makes those inputs: a norm's gain, or a weight's outputs."""

    source: str
    readers: tuple[str, ...]

    @property
    def is_gain(self) -> bool:
        return self.source.endswith("norm")


class Range(NamedTuple):
    """The largest magnitudes of each channel of what matrices read."""

    inputs_ed: Array
    weights_ed: Array


def pairs(p: Layer, block: str) -> list[Pair]:
    """The pairs of a block."""
    if block == "ffn":
        first = [f"{at}.{name}" for at in networks(p) for name in ("w_gate", "w_up")]
        return [Pair("ffn_norm", tuple(first)), *(Pair(f"{at}.w_up", (f"{at}.w_down",)) for at in networks(p))]
    first = [name for name in matrices(p, block) if name not in ("attn.w_uq", "attn.w_o")]
    if isinstance(p.attn, Gqa):
        return [Pair("attn_norm", tuple(first)), Pair("attn.w_v", ("attn.w_o",))]
    query = [Pair("attn.q_norm", ("attn.w_uq",))]
    if p.attn.w_dq is None:
        query, first = [], [*first, "attn.w_uq"]
    return [Pair("attn_norm", tuple(first)), *query, Pair("attn.w_uv", ("attn.w_o",))]


def rescale(p: Layer, pair: Pair, scale_ed: Float[Array, "e d"]) -> Layer:
    """The layer with the inputs of a pair's readers divided by these scales, and their columns multiplied by them."""
    block = pair.readers[0].partition(".")[0]
    weights = matrices(p, block)
    p = with_matrices(p, {name: weights[name] * scale_ed[:, None] for name in pair.readers})
    if pair.source == "ffn_norm" and isinstance(p.ffn, Moe):
        p = replace_at(p, "ffn.w_router", p.ffn.w_router * scale_ed)
    source = _get(p, pair.source)
    if pair.is_gain:
        return replace_at(p, pair.source, source / scale_ed[0])
    if block == "attn":  # of heads that share a value, all readers have the same scales
        scale_ghv = scale_ed.reshape(source.shape[0], -1, source.shape[1])
        return replace_at(p, pair.source, source / scale_ghv[:, 0, :, None])
    return replace_at(p, pair.source, source / scale_ed.reshape(*source.shape[:-1], 1))


def smooth(p: Layer, block: str, found: Sample, cfg: Config, rows: int) -> Layer:
    """The layer with the range of all inputs halfway in the weights."""
    for pair in pairs(p, block):
        p = rescale(p, pair, scales(_ranges(p, pair, inputs(p, block, found, cfg, rows)), SMOOTHING))
    return p


def search_scales(p: Layer, block: str, found: Sample, cfg: Config, rows: int) -> Layer:
    """The layer with each pair rescaled as gives its readers the least error, or not at all; of experts, each its own.

    That is `argmin_s |Q(W s) Q(X / s) - W X|` over the scales that SHARES give, and 1 (arXiv:2506.12708, section 4.5).
    """
    for pair in pairs(p, block):
        entering, weights = inputs(p, block, found, cfg, rows), matrices(p, block)
        ranges = _ranges(p, pair, entering)
        trials_sed = jnp.stack([jnp.ones_like(ranges.inputs_ed), *(scales(ranges, share) for share in SHARES)])
        errors = [_errors(weights[name], entering[name], trials_sed) for name in pair.readers]
        errors_se = jnp.stack([each.sum(1, keepdims=True) for each in errors]).sum(0) if pair.is_gain else errors[0]
        best_e = jnp.argmin(errors_se, axis=0)
        p = rescale(p, pair, trials_sed[best_e, jnp.arange(len(best_e))])
    return p


def scales(ranges: Range, share: float) -> Float[Array, "e d"]:
    """Powers of two that bring both ranges of a channel together; 1 where one of them is nothing."""
    x_ed, w_ed = ranges
    there_ed = (x_ed > 0) & (w_ed > 0)
    log_ed = share * jnp.log2(jnp.where(there_ed, x_ed, 1)) - (1 - share) * jnp.log2(jnp.where(there_ed, w_ed, 1))
    middle_e1 = jnp.median(log_ed, axis=1, keepdims=True)
    return jnp.where(there_ed, jnp.exp2(jnp.round(log_ed - middle_e1)), 1.0)


def rotate(p: Layer) -> Layer:
    """The layer with its latents and values turned by Hadamard matrices."""
    attn = p.attn
    if isinstance(attn, Gqa):
        turn = hadamard(attn.w_v.shape[1])
        return p._replace(
            attn=attn._replace(w_v=_turn_rows(attn.w_v, turn), w_o=jnp.einsum("dhv,vz->dhz", attn.w_o, turn))
        )
    if attn.w_dq is not None and attn.q_norm is not None:
        turn = hadamard(len(attn.w_dq))
        w_uq = _turn_columns(attn.w_uq, attn.q_norm, turn)
        attn = attn._replace(w_dq=turn.T @ attn.w_dq, q_norm=jnp.ones_like(attn.q_norm), w_uq=w_uq)
    turn, values = hadamard(len(attn.w_dkv)), hadamard(attn.w_uv.shape[1])
    return p._replace(
        attn=attn._replace(
            w_dkv=turn.T @ attn.w_dkv,
            kv_norm=jnp.ones_like(attn.kv_norm),
            w_uk=_turn_columns(attn.w_uk, attn.kv_norm, turn),
            w_uv=_turn_rows(_turn_columns(attn.w_uv, attn.kv_norm, turn), values),
            w_o=jnp.einsum("dhv,vz->dhz", attn.w_o, values),
        )
    )


def hadamard(size: int) -> Float[Array, "d d"]:
    """An orthogonal matrix of equal magnitudes; if the size is no power of two, blocks of such matrices."""
    block = np.ones((1, 1))
    while size % (2 * len(block)) == 0:
        block = np.block([[block, block], [block, -block]])
    return jnp.asarray(np.kron(np.eye(size // len(block)), block) / np.sqrt(len(block)), jnp.float32)


def _turn_columns(w_hvd: Array, gain_d: Array, turn: Array) -> Array:
    """A weight that takes over its norm's gain, for inputs that are turned."""
    return jnp.einsum("hvd,dz->hvz", w_hvd * gain_d[None, None], turn)


def _turn_rows(w_hvd: Array, turn: Array) -> Array:
    return jnp.einsum("vz,hvd->hzd", turn, w_hvd)


@jax.jit
def _errors(w_efd: Array, x_etd: Array, trials_sed: Array) -> Float[Array, "s e"]:
    """The error of a matrix for each trial."""
    trial = lambda scale_ed: product_error(w_efd * scale_ed[:, None], x_etd / scale_ed[:, None])  # noqa: E731
    return jax.lax.map(trial, trials_sed)


def _ranges(p: Layer, pair: Pair, entering: dict[str, Array]) -> Range:
    """The ranges that a pair's scales depend on: for all experts together, unless each has inputs of its own."""
    block = pair.readers[0].partition(".")[0]
    weights = matrices(p, block)
    inputs_ed = _largest([jnp.abs(entering[name]).max(1) for name in pair.readers], pair.is_gain)
    weights_ed = _largest([jnp.abs(weights[name]).max(1) for name in pair.readers], pair.is_gain)
    if pair.source != "attn.w_v":
        return Range(inputs_ed, weights_ed)
    groups, width = _get(p, pair.source).shape[:2]
    shared = lambda x_ed: jnp.broadcast_to(  # noqa: E731
        x_ed.reshape(groups, -1, width).max(1, keepdims=True), (groups, x_ed.size // groups // width, width)
    ).reshape(1, -1)
    return Range(shared(inputs_ed), shared(weights_ed))


def _largest(each: list[Array], pooled: bool) -> Array:
    return jnp.concatenate(each).max(0, keepdims=True) if pooled else each[0]


def _get(tree, path: str) -> Array:
    for field in path.split("."):
        tree = getattr(tree, field)
    return tree
