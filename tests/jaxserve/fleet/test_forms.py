"""Fleets whose processes have meshes, INT8 weights, guesses and a context cache: the tokens of one engine alone."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from jaxserve.fleet.control import Control
from jaxserve.fleet.fleet import Fleet
from jaxserve.request import SamplingParams
from tests.jaxserve.conftest import EMBEDDED_SIZE, loaded
from tests.jaxserve.connected import GREEDY, SEEDED, check_answers, of_form, requests
from tests.jaxserve.fleet.conftest import listen
from tests.jaxserve.tiers.conftest import start
from tests.processes import START_UP, Process, free_ports, process
from tests.waiting import eventually

pytestmark = pytest.mark.slow

SIZE = "--max-model-len", str(EMBEDDED_SIZE["max_model_len"]), "--max-num-seqs", "4", "--max-num-batched-tokens", "128"
FEW = """
from jaxserve.engine import Engine
from jaxserve.options import EngineConfig
from jaxserve.programs import Shapes, Tiles
past = lambda engine: (Tiles(16, 8, past=16),) if engine._devices.mesh else ()
EngineConfig.__init__.__kwdefaults__["warmup"] = False
Engine._make_shapes = lambda self: Shapes((Tiles(16, 8), *past(self)), (self.options.max_num_seqs,))
"""
"""Few programs are compiled, and those when they are needed."""
FORMS = [
    of_form(drafts, int8, prefilling, decoding)
    for drafts, int8, prefilling, decoding in [
        (0, False, 1, 1), (1, True, 1, 2), (1, False, 2, 4), (0, True, 2, 4), (0, False, 4, 2), (1, True, 4, 1)
    ]
]  # fmt: skip
"""Guesses, INT8, ranks of prefill and of decode: each two values meet, but of ranks, which do in test_handovers."""


class Stage:
    """A fleet, and the processes of its instances."""

    def __init__(self, drafts: int, int8: bool):
        cfg, _, tokenizer, *_ = loaded("embedded")
        self.fleet = Fleet(cfg, tokenizer, EMBEDDED_SIZE["max_model_len"])
        self.control = Control(self.fleet, b"of the test")
        self._form = "--num-speculative-tokens", str(drafts), *(("--quantization", "int8") if int8 else ())

    def begin(self, stack: ExitStack, role: str, ranks: int, *words: str) -> Process:
        """An instance, when it has joined."""
        joined = self.joined(role)
        mesh = ("--devices", str(ranks), "--mesh", f"1x{ranks}") if ranks > 1 else ()
        router = f"127.0.0.1:{self.control.address[1]}"
        given = "serve", "--role", role, "--router", router, *SIZE, *self._form, *mesh, *words
        started = stack.enter_context(process(*given, plant=FEW))
        assert eventually(lambda: self.joined(role) > joined, START_UP), started.lines
        return started

    def joined(self, role: str) -> int:
        return sum(each.instance.about.role == role for each in self.fleet.members)

    def hits(self, tier: str) -> int:
        """Pages that a tier had."""
        tiers = self.fleet.counters.tiers
        return tiers[tier].hits if tier in tiers else 0

    def answers(self, params: SamplingParams) -> list[list[int]]:
        asked = requests("embedded", params)
        for request in asked:
            self.fleet.add(request)
        heard = listen(self.fleet)
        assert {each.last.finish_reason for each in heard.values()} == {"length"}
        return [heard[request.id, 0].tokens for request in asked]

    def close(self) -> None:
        self.control.close()


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes what a test opens, in the other order."""
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(("drafts", "int8", "prefilling", "decoding"), FORMS)
def test_processes_answer_as_one_engine_cold_and_restarted_over_a_folder_or_a_server(
    drafts, int8, prefilling, decoding, tmp_path: Path, opened
):
    url, folder = start(opened, tmp_path / "server", *free_ports(1)).url, str(tmp_path / "pages")
    stage = opened.enter_context(closing(Stage(drafts, int8)))
    stage.begin(opened, "decode", decoding)
    for places, tier in {f"memory,{folder},{url}": None, folder: "disk", url: "shared"}.items():
        with ExitStack() as ended:
            prefill = stage.begin(ended, "prefill", prefilling, "--context-cache", places)
            for params in (GREEDY, SEEDED):
                check_answers(stage.answers(params), params, drafts, int8, prefilling, decoding)
            assert tier is None or eventually(lambda tier=tier: stage.hits(tier) > 0)
            prefill.process.send_signal(signal.SIGTERM)
            assert prefill.status() == 0 and eventually(lambda: not stage.joined("prefill"))
