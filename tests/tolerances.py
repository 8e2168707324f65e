"""How far two results of the same formula may lie apart: a number of roundings of the dtype, stated here and only here.

Errors are measured against the largest magnitude expected, since sums cancel.
"""

from typing import Any

import numpy as np
from ml_dtypes import finfo

OP = 8
"""One operation, or a few in a row: a norm, a rotation, a product."""
LAYER = 64
"""A layer: some ten operations, sums over up to a hundred products."""
MODEL = 512
"""A whole tiny model: 6e-5 in float32, within the 1e-4 that is promised against Hugging Face."""


def assert_close(actual, expected, roundings: int, dtype: Any = np.float32) -> None:
    """Fails unless all differences are within `roundings` of `dtype`; NaN is never close."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    bound = roundings * float(finfo(dtype).eps) * np.abs(expected).max(initial=0.0)
    error = np.abs(actual - expected).max(initial=0.0)
    assert error <= bound, f"differs by {error:.3g}; {roundings} roundings of {np.dtype(dtype)} allow {bound:.3g}"
