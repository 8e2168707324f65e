import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoints.rounding import (
    CLIPS,
    DAMPING,
    clipped_outputs,
    gptq,
    network_error,
    product_error,
    rounded,
    share_lost,
)
from jaxserve.layers.moe import Mlp
from jaxserve.parallel.qarray import QArray, dequantize
from tests.layers.helpers import f64, normal
from tests.tolerances import LAYER, assert_close

E, T, F, D = 3, 40, 6, 12


def correlated(rng: np.random.Generator) -> jnp.ndarray:
    """Inputs whose channels depend on each other, of very different sizes."""
    mix = rng.standard_normal((D, D)) * np.exp(rng.standard_normal(D))
    return jnp.asarray(rng.standard_normal((E, T, D)) @ mix, jnp.float32)


def quantized(x: np.ndarray) -> np.ndarray:
    """Rows as INT8 represents them."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.round(x / scale) * scale


def test_rounding_clips_at_a_share_of_each_outputs_largest_weight():
    w = jnp.asarray([[[1.27, -0.5, 0.004], [0.0, 0.0, 0.0]]])
    whole, clipped = rounded(w), rounded(w, 0.5)
    assert whole.codes.tolist() == [[[127, -50, 0], [0, 0, 0]]]
    assert clipped.codes.tolist() == [[[127, -100, 1], [0, 0, 0]]]
    assert np.allclose(clipped.scale, [[[0.005], [0.0]]])


def test_the_error_of_a_product_is_that_of_rounded_weights_and_inputs():
    rng = np.random.default_rng(0)
    w, x = normal(rng, E, F, D), normal(rng, E, T, D)
    exact = f64(x) @ f64(w).transpose(0, 2, 1)
    found = quantized(f64(x)) @ quantized(f64(w)).transpose(0, 2, 1)
    expected = ((found - exact) ** 2).sum((1, 2)) / (exact**2).sum((1, 2))
    assert np.allclose(product_error(w, x), expected, rtol=1e-3)


def test_the_error_of_a_network_is_that_of_its_output():
    rng = np.random.default_rng(0)
    net, x = Mlp(normal(rng, E, F, D), normal(rng, E, F, D), normal(rng, E, D, F)), normal(rng, E, T, D)

    def run(gate, up, down, code):
        x_up, x_gate = (code(f64(x)) @ code(w).transpose(0, 2, 1) for w in (up, gate))
        return code(x_up * x_gate / (1 + np.exp(-x_gate))) @ code(down).transpose(0, 2, 1)

    exact, found = (run(*map(f64, net), code) for code in (lambda a: a, quantized))
    expected = ((found - exact) ** 2).sum((1, 2)) / (exact**2).sum((1, 2))
    assert np.allclose(network_error(net, Mlp(*map(rounded, net)), x), expected, rtol=1e-2)


def test_nothing_is_lost_of_nothing():
    assert share_lost(jnp.zeros((1, 2, 2)), jnp.zeros((1, 2, 2))).tolist() == [0.0]


def test_each_output_is_clipped_as_is_best_for_it():
    rng = np.random.default_rng(1)
    w, x = np.asarray(normal(rng, E, F, D)).copy(), normal(rng, E, T, D)
    w[:, 0, 0] = 3 * np.abs(w[:, 0]).max()  # to represent it costs the others of its row more than it is worth
    x = x.at[:, :, 0].set(x[:, :, 0] * 1e-3)
    found = clipped_outputs(jnp.asarray(w), x)
    chosen = np.asarray(found.scale)[..., 0] * 127 / np.abs(w).max(axis=2)
    assert np.allclose(np.asarray(CLIPS)[np.abs(chosen[..., None] - CLIPS).argmin(-1)], chosen, rtol=1e-5)
    assert (chosen[:, 0] < 0.9).all()
    exact = f64(x) @ f64(w).transpose(0, 2, 1)

    def lost(clip):
        scale = clip * np.abs(w).max(axis=2, keepdims=True) / 127
        kept = np.clip(np.round(w / scale), -127, 127) * scale
        return ((quantized(f64(x)) @ f64(kept).transpose(0, 2, 1) - exact) ** 2).sum(1)

    least = np.min([lost(clip) for clip in CLIPS], axis=0)
    assert (lost(chosen[..., None]) <= 1.01 * least).all()


def gptq_by_hand(w: np.ndarray, scale: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Solves anew, after each column, for the remaining weights that make up best for what is lost so far."""
    hessian = x.T @ x
    hessian = hessian + DAMPING * np.diagonal(hessian).mean() * np.eye(len(hessian))
    order, kept, left = list(np.argsort(-np.diagonal(hessian), kind="stable")), np.zeros_like(w), w.copy()
    while order:
        j = order.pop(0)
        kept[:, j] = np.clip(np.round(left[:, j] / scale), -127, 127)
        if order:
            lost = left[:, j] - kept[:, j] * scale
            left[:, order] += np.outer(lost, np.linalg.solve(hessian[np.ix_(order, order)], hessian[order, j]))
    return kept


def test_second_order_rounding_is_what_solving_for_the_remaining_weights_gives():
    rng = np.random.default_rng(0)
    w, x = normal(rng, E, F, D), correlated(rng)
    scale = jnp.abs(w).max(axis=2, keepdims=True) / 20  # coarse, and some weights are clipped
    found = np.asarray(gptq(w, scale, x).codes)
    expected = np.stack([gptq_by_hand(f64(w[e]), f64(scale[e, :, 0]), f64(x[e])) for e in range(E)])
    assert (found != expected).mean() < 0.02  # where float32 rounds the other way
    assert (found != np.clip(np.round(f64(w) / f64(scale)), -127, 127)).mean() > 0.1


def test_second_order_rounding_loses_less_than_plain_rounding():
    rng = np.random.default_rng(2)
    w, x = normal(rng, E, F, D), correlated(rng)
    plain = rounded(w)
    second = gptq(w, plain.scale, x)
    assert np.array_equal(second.scale, plain.scale)
    lost = lambda codes: ((f64(x) @ (f64(dequantize(codes, jnp.float32)) - f64(w)).transpose(0, 2, 1)) ** 2).sum((1, 2))  # noqa: E731
    assert (lost(second) < 0.9 * lost(plain)).all()


def test_weights_of_inputs_that_never_come_are_rounded_plainly():
    w = normal(np.random.default_rng(0), E, F, D)
    found = gptq(w, rounded(w).scale, jnp.zeros((E, T, D)))
    assert isinstance(found, QArray)
    assert np.array_equal(found.codes, rounded(w).codes)
    assert_close(dequantize(found, jnp.float32), dequantize(rounded(w), jnp.float32), LAYER)
