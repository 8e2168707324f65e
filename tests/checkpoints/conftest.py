import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.layers.config import Config
from tests.layers.helpers import Weights, published, random_model, raw_config

WriteFolder = Callable[[dict[str, Any], Weights], Path]


@pytest.fixture
def write_folder(tmp_path: Path) -> WriteFolder:
    """Writes `config.json` and one file of tensors, without the code that is tested."""

    def write(raw: dict[str, Any], tensors: Weights) -> Path:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(raw))
        save_file({name: np.ascontiguousarray(w) for name, w in tensors.items()}, folder / "model.safetensors")
        return folder

    return write


@pytest.fixture(scope="session")
def v3() -> tuple[dict[str, Any], Weights]:
    """A tiny DeepSeek-V3 with an MTP module: its config and tensors."""
    raw = raw_config("deepseek_v3", num_hidden_layers=2)
    return raw, published(random_model(Config.from_hf(raw), np.random.default_rng(0)))
