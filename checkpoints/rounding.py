"""Ways to round matrices to INT8, and what is lost by it.

Matrices are `[e, f, d]`, what enters them `[e, t, d]`; errors are shares of the exact results' squares, `[e]`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.layers.linear import einsum
from jaxserve.layers.moe import Mlp
from jaxserve.parallel.qarray import BOUND, QArray, quantize

CLIPS = (1.0, 0.99, 0.98, 0.97, 0.96, 0.94, 0.92, 0.9, 0.85, 0.8, 0.7)
"""Of the largest magnitude of an output channel, what becomes the largest code."""

DAMPING = 0.01
"""Of the mean of a Hessian's diagonal, what is added to it (GPTQ, section 3.3)."""


def rounded(w_efd: Array, clip: Array | float | None = None) -> QArray:
    """Codes with a scale an output. Clips are for all, or for each expert or output: `[e, 1, 1]` or `[e, f, 1]`."""
    return quantize(w_efd, (2,), clip)


@jax.jit
def product_error(w_efd: Array, x_etd: Array, codes: QArray | None = None) -> Float[Array, " e"]:
    """What a product loses if weights and inputs are rounded; the weights plainly if no codes are given."""
    exact_etf = jnp.einsum("etd,efd->etf", x_etd, w_efd)
    return share_lost(exact_etf, einsum("etd,efd->etf", x_etd, codes or rounded(w_efd)))


@jax.jit
def clipped_outputs(w_efd: Array, x_etd: Array) -> QArray:
    """Codes whose outputs are clipped each as is best for it."""
    exact_etf = jnp.einsum("etd,efd->etf", x_etd, w_efd)
    lost = lambda clip: jnp.square(einsum("etd,efd->etf", x_etd, rounded(w_efd, clip)) - exact_etf).sum(1)  # noqa: E731
    best_ef = jnp.argmin(jax.lax.map(lost, clips := jnp.asarray(CLIPS)), axis=0)
    return rounded(w_efd, clips[best_ef][:, :, None])


@jax.jit
def network_error(exact: Mlp, found: Mlp, x_etd: Array) -> Float[Array, " e"]:
    """What gated networks lose, one for each expert."""
    return share_lost(_network(exact, x_etd), _network(found, x_etd))


def _network(p: Mlp, x_etd: Array) -> Array:
    gate_etf, up_etf = (einsum("etd,efd->etf", x_etd, w) for w in (p.w_gate, p.w_up))
    return einsum("etf,edf->etd", jax.nn.silu(gate_etf) * up_etf, p.w_down)


def share_lost(exact_etd: Array, found_etd: Array) -> Float[Array, " e"]:
    """The squares of the differences over those of the exact results."""
    lost_e, all_e = jnp.square(found_etd - exact_etd).sum((1, 2)), jnp.square(exact_etd).sum((1, 2))
    return lost_e / jnp.where(all_e > 0, all_e, 1)


@jax.jit
def gptq(w_efd: Array, scale_ef1: Array, x_etd: Array) -> QArray:
    """Codes for given scales, column by column: what one loses, those to come make up for, as far as inputs allow.

    Columns with large inputs come first (GPTQ, arXiv:2210.17323, algorithm 1; the order is that of its code's
    `act_order`).
    """
    one = lambda each: _gptq(*each)  # noqa: E731
    return QArray(jax.lax.map(one, (w_efd, scale_ef1[..., 0], x_etd)), scale_ef1)


def _gptq(w_fd: Array, scale_f: Array, x_td: Array) -> Array:
    hessian_dd = x_td.T @ x_td
    energy_d = jnp.diagonal(hessian_dd)
    order_d = jnp.argsort(-energy_d)
    damping = jnp.where(energy_d.any(), DAMPING * energy_d.mean(), 1.0)  # an expert may have seen nothing but zeros
    damped_dd = hessian_dd[order_d][:, order_d] + damping * jnp.eye(len(order_d))
    inverse_dd = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped_dd), True), jnp.eye(len(order_d)))
    upper_dd = jnp.linalg.cholesky(inverse_dd).T

    inverse_f = jnp.where(scale_f > 0, 1 / jnp.where(scale_f > 0, scale_f, 1), 0)

    def column(i, carry):
        left_fd, codes_fd = carry
        codes_f = jnp.clip(jnp.round(left_fd[:, i] * inverse_f), -BOUND, BOUND).astype(jnp.int8)
        lost_f = (left_fd[:, i] - codes_f.astype(w_fd.dtype) * scale_f) / upper_dd[i, i]
        return left_fd - jnp.outer(lost_f, upper_dd[i]), codes_fd.at[:, i].set(codes_f)

    _, codes_fd = jax.lax.fori_loop(0, len(order_d), column, (w_fd[:, order_d], jnp.zeros(w_fd.shape, jnp.int8)))
    return codes_fd[:, jnp.argsort(order_d)]
