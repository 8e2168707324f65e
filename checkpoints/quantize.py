"""INT8 weights that are chosen with text: layer by layer, each part of it a switch (arXiv:2506.12708, section 4.5).

A layer's two blocks, attention and the feed-forward network, are taken one after another. Each part makes a block that
could take the place of the one before, and does so if that loses less on the text. What is lost is the share of the
squares of the block's output, which is computed as it will be served: with INT8 weights and activations.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxserve.checkpoints.folding import rotate, search_scales, smooth
from jaxserve.checkpoints.matrices import (
    BLOCKS,
    Sample,
    expert_load,
    inputs,
    matrices,
    networks,
    output,
    with_matrices,
)
from jaxserve.checkpoints.rounding import (
    CLIPS,
    clipped_outputs,
    gptq,
    network_error,
    product_error,
    rounded,
    share_lost,
)
from jaxserve.layers.config import Config
from jaxserve.layers.moe import Mlp, Moe
from jaxserve.layers.transformer import Layer
from jaxserve.parallel.qarray import QArray

ROWS = 512
"""Tokens of each expert that its errors are measured with."""

FEW_TOKENS = 40
"""Experts that were chosen by fewer are named: their errors are measured with tokens that were not theirs."""

TOO_LOSSY = 1e-2
"""Matrices of whose product more than this share is lost stay as they are."""


class Parts(NamedTuple):
    """What is done besides rounding; each can be left out."""

    outliers: bool = True  # smoothing, and rotations
    scales: bool = True  # the best scale for each pair of weights and activations
    clipping: bool = True  # of the largest weights
    compensation: bool = True  # second-order rounding, and the mean of what is lost as a bias
    mixed: bool = True  # what would lose too much stays in float


class Step(NamedTuple):
    """What a block lost after a part."""

    part: str
    lost: float


class LayerReport(NamedTuple):
    """How a layer became INT8."""

    steps: dict[str, list[Step]]  # of each block; the first is plain rounding
    kept: tuple[str, ...]  # matrices that stayed in float
    starved: tuple[int, ...]  # experts that too few tokens chose


class Block(NamedTuple):
    """A block on its way to INT8."""

    layer: Layer  # its matrices in float
    codes: dict[str, QArray]  # what takes their place
    lost: float

    @property
    def rounded(self) -> Layer:
        """The layer with the codes in place."""
        return with_matrices(self.layer, self.codes)


class Study(NamedTuple):
    """What a block's errors are measured with."""

    block: str
    found: Sample
    cfg: Config
    rows: int = ROWS

    def entering(self, p: Layer) -> dict[str, Array]:
        return inputs(p, self.block, self.found, self.cfg, self.rows)

    def lost(self, p: Layer) -> float:
        """What the block's output loses."""
        exact_td = self.found.outputs[self.block]
        return float(share_lost(exact_td[None], output(p, self.block, self.found, self.cfg)[None])[0])

    def made(self, layer: Layer, codes: dict[str, QArray] | None = None) -> Block:
        """A block with these codes, or rounded plainly."""
        codes = {name: rounded(w) for name, w in matrices(layer, self.block).items()} if codes is None else codes
        return Block(layer, codes, self.lost(with_matrices(layer, codes)))


def quantize_layer(p: Layer, found: Sample, cfg: Config, parts: Parts) -> tuple[Layer, LayerReport]:
    """A layer with INT8 matrices, for what passed through it in float."""
    steps: dict[str, list[Step]] = {}
    kept: list[str] = []
    for block in BLOCKS:
        study = Study(block, found, cfg)
        now = study.made(p)
        steps[block] = [Step("rounding", now.lost)]
        for part, run in _PARTS.items():
            if getattr(parts, part):
                now = min((now, *run(now, study)), key=lambda each: each.lost)
                steps[block].append(Step(part, now.lost))
        kept += [name for name in matrices(p, block) if name not in now.codes]
        p = now.rounded
    if parts.compensation:  # all layers of a model have biases, or none has
        nothing = jnp.zeros(cfg.width)
        biases = {name: nothing if getattr(p, name) is None else getattr(p, name) for name in ("attn_bias", "ffn_bias")}
        p = p._replace(**biases)
    return p, LayerReport(steps, tuple(kept), _starved(p, found, cfg))


def quantize_matrix(w_fd: Array, x_td: Array, parts: Parts) -> tuple[Array | QArray, list[Step]]:
    """A matrix alone, for what enters it: an MTP module's, which belongs to no block."""
    w_efd, x_etd = w_fd[None], x_td[None]
    lost = lambda codes: float(product_error(w_efd, x_etd, codes)[0])  # noqa: E731
    codes = rounded(w_efd)
    steps = [Step("rounding", lost(codes))]
    if parts.clipping:
        codes = min(codes, clipped_outputs(w_efd, x_etd), key=lost)
        steps.append(Step("clipping", lost(codes)))
    if parts.compensation:
        codes = min(codes, gptq(w_efd, codes.scale, x_etd), key=lost)
        steps.append(Step("compensation", lost(codes)))
    if parts.mixed:
        in_float = lost(codes) > TOO_LOSSY
        steps.append(Step("mixed", 0.0 if in_float else lost(codes)))
        if in_float:
            return w_fd, steps
    return QArray(codes.codes[0], codes.scale[0]), steps


def suppress_outliers(now: Block, study: Study) -> Iterator[Block]:
    """The block smoothed, its latents and values rotated, and both."""
    smoothed = smooth(now.layer, study.block, study.found, study.cfg, study.rows)
    yield study.made(smoothed)
    if study.block == "attn":
        yield study.made(rotate(now.layer))
        yield study.made(rotate(smoothed))


def rescale_pairs(now: Block, study: Study) -> Iterator[Block]:
    """The block with the scales that are best for each pair."""
    yield study.made(search_scales(now.layer, study.block, study.found, study.cfg, study.rows))


def clip(now: Block, study: Study) -> Iterator[Block]:
    """The block with each output clipped as is best for it, and with each matrix as is best for the block.

    Matrices are taken one after another, and experts each alone.
    """
    codes, entering = dict(now.codes), study.entering(now.layer)
    weights = matrices(now.layer, study.block)
    yield study.made(now.layer, {name: clipped_outputs(w, entering[name]) for name, w in weights.items()})
    if study.block == "attn":
        for name, w in weights.items():
            trials = [study.made(now.layer, codes | {name: rounded(w, share)}) for share in CLIPS]
            codes = min(trials, key=lambda each: each.lost).codes
        yield study.made(now.layer, codes)
        return
    for at in networks(now.layer):
        names = [f"{at}.{field}" for field in Mlp._fields]
        exact, x_etd = Mlp(*(weights[name] for name in names)), entering[names[0]]
        for name in names:
            trials = [codes | {name: rounded(weights[name], share)} for share in CLIPS]
            errors_se = jnp.stack(
                [network_error(exact, Mlp(*(trial[each] for each in names)), x_etd) for trial in trials]
            )
            codes[name] = rounded(weights[name], jnp.asarray(CLIPS)[jnp.argmin(errors_se, axis=0)][:, None, None])
    yield study.made(now.layer, codes)


def compensate(now: Block, study: Study) -> Iterator[Block]:
    """The block with second-order rounding where that loses less, and with a bias for the mean of what is lost."""
    weights, entering = matrices(now.layer, study.block), study.entering(now.layer)
    codes = {}
    for name, plain in now.codes.items():
        w_efd, x_etd = weights[name], entering[name]
        second = gptq(w_efd, plain.scale, x_etd)
        better_e = product_error(w_efd, x_etd, second) < product_error(w_efd, x_etd, plain)
        codes[name] = QArray(jnp.where(better_e[:, None, None], second.codes, plain.codes), plain.scale)
    for block in (now, study.made(now.layer, codes)):
        yield block
        exact_td = study.found.outputs[study.block]
        mean_d = (exact_td - output(block.rounded, study.block, study.found, study.cfg)).mean(0)
        bias, known = f"{study.block}_bias", getattr(block.layer, f"{study.block}_bias")
        yield study.made(block.layer._replace(**{bias: mean_d if known is None else known + mean_d}), block.codes)


def keep(now: Block, study: Study) -> Iterator[Block]:
    """The block with what loses too much in float."""
    weights, entering = matrices(now.layer, study.block), study.entering(now.layer)
    lost = {name: float(product_error(weights[name], entering[name], w).mean()) for name, w in now.codes.items()}
    for at, *fields in _TOGETHER:
        names = [name for name in lost if name.rpartition(".") in [(at, ".", field) for field in fields]]
        lost |= dict.fromkeys(names, max((lost[name] for name in names), default=0.0))
    yield study.made(now.layer, {name: w for name, w in now.codes.items() if lost[name] <= TOO_LOSSY})


_TOGETHER = (
    ("attn", "w_dq", "w_dkv", "w_kr"),
    ("attn", "w_q", "w_k", "w_v"),
    ("ffn", "w_gate", "w_up"),
    ("ffn.shared", "w_gate", "w_up"),
    ("ffn.experts", "w_gate", "w_up", "w_down"),
)
"""Matrices that are one tensor of the files, or that other engines multiply as one: they are INT8 together or not."""


_PARTS: dict[str, Callable[[Block, Study], Iterable[Block]]] = {
    "outliers": suppress_outliers,
    "scales": rescale_pairs,
    "clipping": clip,
    "compensation": compensate,
    "mixed": keep,
}


def _starved(p: Layer, found: Sample, cfg: Config) -> tuple[int, ...]:
    """Experts that too few tokens chose."""
    if not isinstance(p.ffn, Moe):
        return ()
    load_e = expert_load(p, found.middle_td, cfg)
    return tuple(int(e) for e in jnp.flatnonzero(load_e < FEW_TOKENS))
