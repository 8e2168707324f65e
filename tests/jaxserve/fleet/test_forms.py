"""Fleets of processes with meshes, INT8 weights, guesses and a context cache: the tokens of one engine alone."""

import functools
import itertools
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from jaxserve.fleet.control import Control
from jaxserve.fleet.fleet import Fleet
from jaxserve.fleet.instance import Instance, Role
from jaxserve.request import SamplingParams
from tests.jaxserve.conftest import EMBEDDED_SIZE, loaded, short_folder
from tests.jaxserve.connected import FORMS, GREEDY, SEEDED, check_answers, requests
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
EngineConfig.__init__.__kwdefaults__ |= {"warmup": False, "page_size": 16, "num_pages": 12}
Engine._make_shapes = lambda self: Shapes((Tiles(16, 8), *past(self)), (self.options.max_num_seqs,))
"""
"""Few programs are compiled, and those when they are needed.

Prompts have several pages, and those of a few questions ago are forgotten.
"""
RANKS = 1, 2, 4
CASES = list(itertools.product(RANKS, RANKS, (GREEDY, SEEDED)))
"""Ranks of prefill, ranks of decode, what is asked."""
PAGES = 8
"""Different pages of what is asked that can be found."""


class Stage:
    """A fleet with a prefill and a decode process of each size, of which two at a time are given something to do."""

    def __init__(self, drafts: int, int8: bool, opened: ExitStack, folder: Path):
        self.form = drafts, int8
        cfg, _, tokenizer, *_ = loaded("short")
        url, pages = start(opened, folder / "server", *free_ports(1)).url, str(folder / "pages")
        self.places = {"memory": f"memory,{pages},{url}", "disk": pages, "shared": url}
        self.fleet = Fleet(cfg, tokenizer, EMBEDDED_SIZE["max_model_len"])
        self._control, self._opened = opened.enter_context(closing(Control(self.fleet, b"of the test"))), opened
        self._words = "--num-speculative-tokens", str(drafts), *(("--quantization", "int8") if int8 else ())
        self._begin("decode")
        self._tier, self._prefills = "memory", self._begin("prefill", self.places["memory"])
        self.first = functools.cache(self.ask)
        """Answers to a case that nobody has been asked before."""

    def ask(self, prefilling: int, decoding: int, params: SamplingParams) -> list[list[int]]:
        """Answers of the two instances with so many ranks. No other case's pages are of use."""
        for instance in self._instances():
            instance.draining = instance.about.ranks != (  # type: ignore[misc]
                prefilling if instance.about.role == "prefill" else decoding
            )
        asked = requests("short", params, cache_salt=f"{prefilling} {decoding} {params.temperature}")
        for request in asked:
            self.fleet.add(request)
        heard = listen(self.fleet)
        assert {each.last.finish_reason for each in heard.values()} == {"length"} and not self.fleet.tally.missed
        return [heard[request.id, 0].tokens for request in asked]

    def over(self, tier: str) -> None:
        """Begins prefill instances that have nothing but what this tier has, unless they are those that there are."""
        if tier == self._tier:
            return
        for each in self._prefills:
            each.process.send_signal(signal.SIGTERM)
        assert [each.status() for each in self._prefills] == [0, 0, 0]
        assert eventually(lambda: not self._instances("prefill"))
        self._tier, self._prefills = tier, self._begin("prefill", self.places[tier])

    def hits(self, tier: str) -> int:
        """Pages that a tier had."""
        tiers = self.fleet.counters.tiers
        return tiers[tier].hits if tier in tiers else 0

    def _instances(self, role: Role | None = None) -> list[Instance]:
        found = [member.instance for member in self.fleet.members]
        return [each for each in found if role in (None, each.about.role)]

    def _begin(self, role: Role, places: str = "") -> list[Process]:
        """Instances of each size, with a context cache in these places, when they have joined."""
        router, started = f"127.0.0.1:{self._control.address[1]}", list[Process]()
        for ranks in RANKS:
            mesh = ("--devices", str(ranks), "--mesh", f"1x{ranks}") if ranks > 1 else ()
            cache = ("--context-cache", places) if places else ()
            given = "serve", str(short_folder()), "--role", role, "--router", router, *SIZE, *self._words, *mesh, *cache
            started.append(self._opened.enter_context(process(*given, plant=FEW)))
        joined = lambda: len(self._instances(role)) == len(RANKS)  # noqa: E731
        eventually(lambda: joined() or any(each.process.poll() is not None for each in started), START_UP)
        assert joined(), [each.lines for each in started]
        return started


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with ExitStack() as opened:
        yield Stage(*request.param, opened, tmp_path_factory.mktemp("stage"))


forms = pytest.mark.parametrize(
    "stage", [pytest.param(each.values, marks=each.marks) for each in FORMS], indirect=True, ids=str
)


@forms
def test_a_fleet_answers_as_one_engine(stage):
    for prefilling, decoding, params in CASES:
        check_answers(stage.first(prefilling, decoding, params), params, *stage.form, prefilling, decoding)


@forms
@pytest.mark.parametrize("tier", ["memory", "disk", "shared"])
def test_what_its_context_cache_has_kept_changes_no_answer(stage, tier):
    for case in CASES:
        stage.first(*case)
    stage.over(tier)
    before = stage.hits(tier)
    for prefilling, decoding, params in CASES:
        check_answers(stage.ask(prefilling, decoding, params), params, *stage.form, prefilling, decoding)
    least = PAGES * len(CASES) * 0.75  # the device has some, which another request of the same question has brought
    assert eventually(lambda: stage.hits(tier) - before >= least)
