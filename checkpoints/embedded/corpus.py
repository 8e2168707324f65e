"""The embedded model's text: the running interpreter's own standard library, and its tokenizer.

Modules are split by a hash of their name, so that a module is held out under every version of Python or under none.
"""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BEGIN, END = "<|begin|>", "<|end|>"
VOCABULARY = 4096
HELD_OUT_PERCENT = 10

LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
"""Folders that are not the library (packages, tests) or that a program wrote (tables of characters, topics of help)."""

WORDS = Regex(r"\n+ *| ?[^\W\d]+|\d| ?[^\w\s]+|\s+?")
"""What a token stays within: a line's end and the next indentation, a word and the space before it, a digit, signs."""


class Module(NamedTuple):
    """One file of the library."""

    name: str  # dotted, as imported
    text: str


def modules(library: Path | None = None) -> list[Module]:
    """All modules of the library, by name; files that aren't UTF-8 are left out."""
    library = library or Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts) and not parts[-1].startswith("_sysconfigdata"):
            try:
                found.append(Module(".".join(parts), path.read_text("utf-8")))
            except UnicodeDecodeError:
                continue
    return found


def is_held_out(name: str) -> bool:
    """Whether the module of that name is kept from training."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


def split(found: list[Module]) -> tuple[list[Module], list[Module]]:
    """The modules to train on, and those held out."""
    return [m for m in found if not is_held_out(m.name)], [m for m in found if is_held_out(m.name)]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level byte-pair encoding: every text has an encoding, and decoding it gives the text back."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(WORDS, behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, found: list[Module]) -> list[np.ndarray]:
    """The tokens of each module, uint16, with neither begin nor end."""
    return [np.array(e.ids, np.uint16) for e in tokenizer.encode_batch([m.text for m in found])]
