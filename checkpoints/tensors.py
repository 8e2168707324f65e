"""The tensors of a checkpoint as values: floats, or codes and their scales."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxserve.checkpoints.formats import FP8, Format
from jaxserve.checkpoints.safetensors import Tensor
from jaxserve.parallel.errors import CheckpointError


@dataclass(frozen=True)
class Tensors:
    """A folder's tensors by name, and the format of those that are codes."""

    folder: Path
    table: dict[str, Tensor]
    format: Format

    def format_of(self, name: str) -> Format | None:
        """The format of a tensor's codes; None if it has floats. FP8 needs no announcement: there is but one."""
        dtype = self.table[name].dtype
        return FP8 if dtype == FP8.codes else self.format if dtype == self.format.codes else None

    def floats(self, name: str) -> np.ndarray:
        """A tensor's values; of codes, float32."""
        form = self.format_of(name)
        return self.table[name].read() if form is None else form.dequantized(self.codes(name), self._scale(name, form))

    def codes(self, name: str) -> np.ndarray:
        """Codes as they are, once it is known that nothing but a scale makes values of them."""
        codes = self.table[name].read()
        if self.format.offsets:
            self._check_offset(f"{name}_offset")
        if self.format.static(name.removesuffix(".weight")):
            self._check_bias(name.removesuffix("weight"), codes)
        return codes

    def scales(self, name: str, count: int) -> np.ndarray:
        """So many scales for each row of codes, float32 `[out, count]`."""
        return self.format.rows(self._scale(name, self.format), self.table[name].shape, count)

    def _scale(self, name: str, form: Format) -> np.ndarray:
        scale = self.table[name + form.suffix].read()
        if not (np.isfinite(scale) & (scale >= 0)).all():
            raise self._error(f"{name}{form.suffix} has scales that are NaN, infinite or negative; fetch it again")
        return scale

    def _check_offset(self, name: str) -> None:
        if name in self.table and self.table[name].read().any():
            raise self._error(f"{name} is not zero: asymmetric weights are not supported; quantize it symmetrically")

    def _check_bias(self, at: str, codes: np.ndarray) -> None:
        """That a static activation's zero point is all that `quant_bias` makes up for.

        Ours have none, and so need no such bias; one of the layer's own would be lost. It was computed in float32.
        """
        if f"{at}quant_bias" not in self.table:
            return
        offset = float(self.table[f"{at}input_offset"].read()[0]) if f"{at}input_offset" in self.table else 0.0
        expected = -offset * codes.sum(axis=1, dtype=np.int64)
        wrong = np.abs(self.table[f"{at}quant_bias"].read() - expected) > 1 + 2.0**-22 * np.abs(expected)
        if wrong.any():
            raise self._error(
                f"{at}quant_bias holds more than the activations' zero point: a bias, which is not supported"
            )

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: {what}")
