"""The router of a model: what it needs of the model's folder, a fleet, and the port where instances join."""

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxserve import options as sizes
from jaxserve.checkpoints.hf import read_json
from jaxserve.checkpoints.hub import TOKENIZER_FILES, locate
from jaxserve.fleet.control import Control
from jaxserve.fleet.fleet import Fleet, FleetOptions
from jaxserve.layers.config import Config
from jaxserve.llm import LLM, check_vocabulary
from jaxserve.options import EngineConfig
from jaxserve.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """Where instances join, and how the fleet goes about its jobs."""

    token: bytes
    host: str = "127.0.0.1"
    port: int = 0  # any that is free
    period: float = 0.5  # seconds between two heartbeats
    fleet: FleetOptions = field(default_factory=FleetOptions)


def route(model: str | None, max_model_len: int | None, options: RouterOptions, tell: Callable[[str], object]) -> LLM:
    """A model that instances serve, as soon as they have joined, until it is closed.

    Of the folder it needs config.json and the tokenizer's files, and no weights. `tell` is told where they can join.
    """
    folder = locate(model, TOKENIZER_FILES)
    tokenizer, cfg = Tokenizer.from_folder(folder), Config.from_hf(read_json(folder))
    check_vocabulary(tokenizer, cfg, folder)
    fleet = Fleet(cfg, tokenizer, sizes.model_len(cfg, EngineConfig(max_model_len=max_model_len)), options.fleet)
    control = Control(fleet, options.token, host=options.host, port=options.port, period=options.period)
    host, port = control.address
    tell(f"instances join at {host}:{port}")

    def close() -> None:
        control.close()
        fleet.close()

    return LLM.over(fleet, tokenizer, close)
