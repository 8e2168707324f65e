"""What the machine can do, found with JAX in the run that is compared with it: how fast it reads and multiplies.

They are limits, so of all forms and repetitions the best counts. What XLA can't do here, such a limit doesn't show: a
program of other making can be above it.
"""

import itertools
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.compilation import OPTIONS

Progress = Callable[[int, int], None]

READ = 1 << 29
"""Bytes that are read at once: more than caches hold."""
LONG = 0.05
"""Seconds of a product after which larger ones are not tried."""

SHAPES = (
    (512, 1024, 4096),
    (512, 2048, 2048),
    (512, 4096, 4096),
    (2048, 2048, 2048),
    (4096, 4096, 4096),
    (8192, 8192, 8192),
)
"""Of products: rows, inputs, outputs, from small to large."""
ORDERS = {"td,fd->tf": lambda d, f: (f, d), "td,df->tf": lambda d, f: (d, f)}

REDUCTIONS: Mapping[str, tuple[Any, Callable[[jax.Array], jax.Array]]] = {
    "sum of float32": (jnp.float32, lambda x: x.sum(axis=1)),
    "largest of float32": (jnp.float32, lambda x: x.max(axis=1)),
    "largest of int32": (jnp.int32, lambda x: x.max(axis=1)),
    "largest of int8": (jnp.int8, lambda x: x.max(axis=1)),
    "product with a vector": (jnp.float32, lambda x: x @ jnp.ones(x.shape[1], x.dtype)),
}
"""Ways to read all of a matrix, `[rows, …]`."""


class Limits(NamedTuple):
    """What nothing on this machine exceeds."""

    bandwidth: float  # bytes read a second, by all cores together
    peaks: dict[str, float]  # operations a second (two a product) by the dtype of factors: int8, bfloat16, float32


def measure(turns: int = 5, progress: Progress | None = None) -> Limits:
    """The best of so many turns of every form, on the device that JAX uses."""
    kinds, told = ("int8", "bfloat16", "float32"), progress or (lambda done, total: None)
    total = len(REDUCTIONS) + len(kinds)
    bandwidth = 0.0
    for done, (dtype, reduction) in enumerate(REDUCTIONS.values()):
        told(done, total)
        bandwidth = max(bandwidth, reading(reduction, dtype, turns))
    peaks = {}
    for done, kind in enumerate(kinds, start=len(REDUCTIONS)):
        told(done, total)
        peaks[kind] = peak(jnp.dtype(kind), turns)
    told(total, total)
    return Limits(bandwidth, peaks)


def reading(reduction: Callable[[jax.Array], jax.Array], dtype: Any, turns: int) -> float:
    """Bytes a second of a reduction of a large matrix."""
    dtype = jnp.dtype(dtype)
    x = jnp.ones((16384, READ // dtype.itemsize // 16384), dtype)
    return x.nbytes / fastest(reduction, x, turns=turns)


def peak(dtype: Any, turns: int) -> float:
    """Operations a second of the fastest product of matrices of this dtype; sums of int8 are int32."""
    sums, best = jnp.int32 if dtype == jnp.int8 else None, 0.0
    for (t, d, f), spec in itertools.product(SHAPES, ORDERS):
        x, w = jnp.ones((t, d), dtype), jnp.ones(ORDERS[spec](d, f), dtype)
        run = partial(jnp.einsum, spec, preferred_element_type=sums)
        seconds = fastest(run, x, w, turns=turns)
        best = max(best, 2 * t * d * f / seconds)
        if spec == list(ORDERS)[-1] and seconds > LONG:
            break
    return best


def fastest(run: Callable[..., Any], *given: Any, turns: int) -> float:
    """Seconds of the fastest of so many turns, after one that compiles."""
    run = compiled(run)
    jax.block_until_ready(run(*given))
    found = []
    for _ in range(turns):
        began = time.perf_counter()
        jax.block_until_ready(run(*given))
        found.append(time.perf_counter() - began)
    return min(found)


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` as the engine compiles its programs, when it is first called."""
    return jax.jit(run, compiler_options=OPTIONS.get(jax.default_backend()))
