"""What the code is compared with; shares none of it."""

from pathlib import Path


def goldens_folder() -> Path:
    """The tiny checkpoints that `make_goldens.py` made, one folder each."""
    return Path(__file__).parent / "goldens"
