"""Whether the libraries compute the same: greedy answers of a tiny model, in float32, beside transformers'."""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from benchmarks.peers.files import need
from benchmarks.peers.job import Job
from benchmarks.peers.peer import PEERS, Peer, ask
from jaxserve.bench.models import MODELS, describe, draw
from jaxserve.checkpoints import hf
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.layers.config import Config

TINY: dict[str, Any] = {
    "vocab_size": 4096,  # the embedded model's, whose tokenizer it has
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
}
"""Sizes that divide into the blocks of 32 and 64 that the libraries' 8 bits have."""
EXACT = 1e-4
"""The most that log-probabilities may differ by in float32, in nats."""
ROUNDED = 0.5
"""And with weights of 8 bits: the worst of all tokens."""


(REFERENCE,) = (peer for peer in PEERS if peer.name == "transformers")


class Agreement(NamedTuple):
    """How far one library's answers are the other's."""

    same: int  # tokens until the first that is another, of all answers
    total: int
    difference: float  # the largest of log-probabilities, of these tokens


class Verdict(NamedTuple):
    """Of a library and a form of weights."""

    peer: Peer
    form: str
    agreement: Agreement

    @property
    def holds(self) -> bool:
        """Whether it does the same computation."""
        if self.form == "float32":
            return self.agreement.same == self.agreement.total and self.agreement.difference < EXACT
        return self.agreement.same > 0 and self.agreement.difference < ROUNDED


def verdicts(name: str, peers: Iterable[Peer], python: str) -> Iterable[Verdict]:
    """Asks each for answers in float32, and in the form that is measured."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_tiny(folder, name)
        job = Job(made, "float32", (3,), 40, 24, TINY["vocab_size"], 0, 600.0, logprobs=True)
        expected = _answer(REFERENCE, python, job)
        for peer in peers:
            for form in dict.fromkeys(("float32", peer.form)):
                need(peer, folder, form)
                yield Verdict(peer, form, agreement(_answer(peer, python, job._replace(form=form)), expected))


def write_tiny(folder: Path, name: str) -> None:
    """A model of the standard one's structure, in float32."""
    raw = {**MODELS[name], **{key: size for key, size in TINY.items() if key in MODELS[name]}}
    cfg = Config.from_hf(raw)
    weights = draw(describe(cfg, "float32", jnp.float32))
    hf.save(folder, weights, cfg, raw | {"dtype": "float32"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / file, folder)


def _answer(peer: Peer, python: str, job: Job) -> dict[str, Any]:
    return next(said for said in ask(peer, python, job) if "tokens" in said)


def agreement(answer: dict[str, Any], expected: dict[str, Any]) -> Agreement:
    """Compares the tokens and log-probabilities of `Answer`s, given as dicts."""
    same, total, differences = 0, 0, [0.0]
    for tokens, wanted, scores, right in zip(
        answer["tokens"], expected["tokens"], answer["logprobs"], expected["logprobs"], strict=True
    ):
        equal = [one == other for one, other in zip(tokens, wanted, strict=True)]
        until = equal.index(False) if False in equal else len(equal)
        differences += [abs(a - b) for a, b in zip(scores[:until], right[:until], strict=True)]
        same, total = same + until, total + len(wanted)
    return Agreement(same, total, max(differences))
