"""The files that libraries read: a model as Hugging Face publishes them, and beside it one for llama.cpp."""

from pathlib import Path

from benchmarks.peers.peer import Peer
from jaxserve.bench import models


def make(name: str, folder: Path) -> None:
    """Writes a standard model in bfloat16, unless it is there."""
    if not (folder / "tokenizer_config.json").exists():  # the last that is written
        models.save(folder, name, "bfloat16")


def need(peer: Peer, folder: Path, form: str) -> None:
    """Writes what a library can't do without, unless it is there."""
    path = folder / f"{form}.gguf"
    if peer.name == "llama.cpp" and not path.exists():
        from benchmarks.peers import gguf_file

        gguf_file.write(folder, path, form)
