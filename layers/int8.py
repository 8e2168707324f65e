"""Which weights are INT8, and a model with them (arXiv:2506.12708, section 4.5; arXiv:2508.02520, section 4.7)."""

from typing import Any

import jax

from jaxserve.layers.mla import Mla
from jaxserve.layers.moe import Moe
from jaxserve.layers.transformer import Layer, Model
from jaxserve.parallel.qarray import QArray, quantize
from jaxserve.parallel.sharding import quantized


def in_int8(params: Model) -> Model:
    """The tree of `Param` with the matrices of attention, networks and experts in INT8, a scale an output channel.

    What is small or decides stays as it is: embedding, head, routers, norms. So do `w_uk` and `w_uv`: absorbed, they
    are summed over what are their output channels.
    """

    def layer(p: Layer) -> Layer:
        attn, ffn = _matrices(p.attn), p.ffn
        attn = attn._replace(w_o=quantized(p.attn.w_o, (p.attn.w_o.shape[0], 1, 1)))  # its sums go over heads, too
        if isinstance(p.attn, Mla):
            attn = attn._replace(w_uk=p.attn.w_uk, w_uv=p.attn.w_uv)
        if not isinstance(ffn, Moe):
            return p._replace(attn=attn, ffn=_matrices(ffn))
        ffn = ffn._replace(experts=_matrices(ffn.experts), shared=_matrices(ffn.shared))
        return p._replace(attn=attn, ffn=ffn)

    mtp = tuple(p._replace(layer=layer(p.layer), w_join=_matrices(p.w_join)) for p in params.mtp)
    return params._replace(layers=tuple(map(layer, params.layers)), mtp=mtp)


def multiplied(params: Model) -> Model:
    """The same with the head, too: all that can be multiplied in integers if it is stored so."""
    return in_int8(params)._replace(head=_matrices(params.head))


def described(model: Model, params: Model) -> Model:
    """The tree of `Param` of a model: that of its floats, in INT8 with as many scales where the model's weights are."""
    one = lambda w, p: quantized(p, w.scale.shape) if is_quantized(w) else p  # noqa: E731
    return jax.tree.map(one, model, params, is_leaf=is_quantized)


def is_int8(model: Any) -> bool:
    """Whether a model, or a part of one, has such weights, or such `Param`."""
    return any(map(is_quantized, jax.tree.leaves(model, is_leaf=is_quantized)))


def is_quantized(leaf: Any) -> bool:
    """Whether a weight is INT8: where trees of weights end."""
    return isinstance(leaf, QArray)


def quantize_model(model: Any, params: Any) -> Any:
    """Weights of a model, or of a part, as their `Param` describe them: rounded, if that is INT8 and they are not."""
    both = lambda p, w: quantize_like(p, w) if is_quantized(p) and not is_quantized(w) else w  # noqa: E731
    return jax.tree.map(both, params, model, is_leaf=is_quantized)


def quantize_like(p: QArray, w: jax.Array) -> QArray:
    """A weight, rounded to INT8 with the scales of its `Param`."""
    return quantize(w, tuple(axis for axis, size in enumerate(p.scale.shape) if size == 1))


def _matrices(tree: Any) -> Any:
    return jax.tree.map(lambda p: quantized(p) if len(p.shape) > 1 else p, tree)
