"""The engine: plans a step, launches it, and reads the one before while the device works on it."""

import copy
import operator
import time
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve import __version__
from jaxserve import options as sizes
from jaxserve.acceptance import Acceptance
from jaxserve.answers import Answers
from jaxserve.connector import Connector
from jaxserve.counters import Counters
from jaxserve.executables import Executables
from jaxserve.guidance import Guide
from jaxserve.identity import Identity, identify
from jaxserve.layers.config import Config
from jaxserve.layers.int8 import is_int8
from jaxserve.layers.sampling import Logprobs
from jaxserve.layers.spread import mixtures, payload
from jaxserve.layers.transformer import Model
from jaxserve.options import EngineConfig
from jaxserve.packing import Mark, Packer, Piece, Spot, completed, entwined, row_numbers
from jaxserve.pages import PagePool
from jaxserve.parallel.devices import Devices
from jaxserve.parallel.errors import ShardingError
from jaxserve.parallel.moves import MOVES, move
from jaxserve.parallel.processes import Processes
from jaxserve.parallel.ranks import Ranks
from jaxserve.porter import FILLED, Porter
from jaxserve.programs import Programs, Progress, Shapes
from jaxserve.ranked import Ranked
from jaxserve.reading import Reading, Row
from jaxserve.rebalance import Rebalancer
from jaxserve.request import Output, Request
from jaxserve.scheduler import Chunk, Limits, Plan, Room, Scheduler, Sequence
from jaxserve.serving import Memory
from jaxserve.slots import mark
from jaxserve.spmd import Call
from jaxserve.steps import ROUNDS, Chosen, Prefilled
from jaxserve.table import SlotTable
from jaxserve.together import Share, Together, Wish
from jaxserve.tokenizer import Tokenizer
from jaxserve.tracing import call_of, empty_state, make_gate

PATIENCE = 0.03
"""Seconds that a step of several rounds may take."""

FLAT = 256
"""CPU devices that can all exchange at once: each pair would have a connection, each device a thread that waits."""


class Launched(NamedTuple):
    """A step on its way, and what of it is this process's."""

    spots: tuple[Spot, ...]  # of all
    completed: tuple[Row, ...]  # of `prefilled`
    prefilled: Prefilled | None
    rows: tuple[Row, ...]  # of `chosen`
    chosen: Chosen | None
    rounds: int

    @property
    def last(self) -> Any:
        """An array of the program that ends last."""
        chosen = self.chosen or (self.prefilled and self.prefilled.chosen)
        return chosen and chosen.count_s


class Engine:
    """Serves requests on one device, or on the ranks of a mesh; `Serving` says what its methods promise.

    Each rank has its own sequences, with their slots and pages, and some of the experts; all take part in every step.
    """

    def __init__(
        self,
        model: Model,
        cfg: Config,
        tokenizer: Tokenizer,
        options: EngineConfig | None = None,
        progress: Progress | None = None,
        mesh: Mesh | None = None,
        executables: Executables | None = None,
        connector: Connector | None = None,
    ):
        """Takes the weights over, makes the cache, and compiles the steps; `progress` is told how far that is.

        On a mesh the weights lie already as `parallel.sharding.DECODE` says, see `layers.spread`. Steps that are
        among the `executables` aren't compiled; others are kept there. Pages come and go by the `connector`.
        """
        self.cfg, self.options = cfg, (options := options or EngineConfig())
        self.max_model_len, self.drafts = sizes.model_len(cfg, options), sizes.drafts(cfg, options)
        self._devices = Devices(mesh)
        self._ranks = Ranks(
            payload=payload(model), implementation=options.expert_exchange, microbatches=options.num_microbatches
        )
        if mesh and mesh.size > FLAT and options.expert_exchange == "flat" and mesh.devices.flat[0].platform == "cpu":
            raise ShardingError(
                f"{mesh.size} ranks on CPU need expert_exchange='hierarchical': flat ones hang beyond {FLAT}"
            )
        self._porter = Porter(connector, self._devices, options.page_size)
        self._together = Together(Processes.all() if self._devices.shared else None)
        self._together.check_same(
            config=cfg,
            options=options,
            mesh=mesh and dict(mesh.shape),
            dtype=model.embed.dtype,
            payload=self._ranks.payload,
            int8=is_int8(model),
            weights=_checksum(model) if self._together.many else None,
            **{"end tokens": sorted(tokenizer.eos_ids), "jax": jax.__version__, "jaxserve": __version__},
        )
        self._model = model if mesh else jax.device_put(model, jax.local_devices()[0])
        self._acceptance = Acceptance(cfg, tokenizer, self.max_model_len)
        self._eos_ids, self._guides = self._acceptance.eos_ids, self._acceptance.guides
        self._shapes = self._make_shapes()
        pages = sizes.num_pages(cfg, options, model.embed.dtype)
        self._make_pool = lambda: PagePool(pages, options.page_size, lookahead=min(1, self.drafts))
        make_scheduler = lambda: Scheduler(self._make_pool(), self._limits())  # noqa: E731
        self._schedulers = Ranked(len(self._devices.here), make_scheduler)
        self._packer = Packer(self.drafts, cfg.vocab_size, options.max_num_seqs, self._devices)
        self._empty()
        self._load_le = np.zeros(self._load_seen.shape[1:], np.int64)
        self._gate = make_gate(options, self._devices)
        here = len(self._devices.here)
        self.counters = Counters(
            pages=pages * here, page_size=options.page_size, slots=options.max_num_seqs * here,
            accepted=[0] * self.drafts,
        )  # fmt: skip
        self._answers = Answers(
            ranks=self._schedulers,
            tokenizer=tokenizer,
            eos_ids=self._eos_ids,
            guides=self._guides,
            counters=self.counters,
            longest=self.max_model_len,
            seeds=np.random.default_rng((options.seed, self._devices.here.start)),
            keep=lambda s, output: self._porter.keep(self._state.cache, s, output),
        )
        self._company = False  # whether another process has answers to give
        self._aim: np.ndarray | None = None
        self._ongoing: Launched | None = None
        self._said: list[Output] = []  # by a step that is being read
        self._came = 0.0  # when the step before was there
        self._round_seconds = PATIENCE  # what one takes
        self._programs = Programs(self._call, executables)
        self._failure: BaseException | None = None
        self._rebalancer = Rebalancer(self._model, self._devices) if mesh and cfg.experts else None
        if options.warmup:
            moves = [move] if self._rebalancer else []
            self._programs.compile([*self._shapes.prefill, *self._shapes.decode, mark, *moves], progress)
            self._state = self._state._replace(cache=self._porter.compile(self._state.cache))
        self.counters.compiled = len(self._programs)

    @property
    def memory(self) -> Memory:
        parts = lambda tree: (part.data for leaf in jax.tree.leaves(tree) for part in leaf.addressable_shards)  # noqa: E731
        size = lambda tree: sum(part.nbytes for part in parts(tree))  # noqa: E731
        return Memory(size(self._model), size(self._state))

    @property
    def busy(self) -> bool:
        return bool(self._answers) or self._company or self._porter.busy

    @property
    def many(self) -> bool:
        return self._together.many

    @property
    def ready(self) -> bool:
        return True

    @property
    def offered(self) -> int:
        """Requests whose pages other engines may take, now or soon."""
        return self._porter.offered

    @property
    def identity(self) -> Identity:
        """What tells its weights and its cache from those of other engines."""
        part = f"{_checksum(self._model):08x}" + ("-int8" if is_int8(self._model) else "")
        return identify(self.cfg, self._porter.version or part, self._model.embed.dtype, self.options)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        return self.cfg.mixture_layers

    def check(self, request: Request) -> None:
        self._acceptance.check(request)
        self._porter.check(request)

    def add(self, request: Request) -> None:
        self._check_whole()
        request = copy.deepcopy(request)  # whoever asks may change lists that were given
        request = replace(request, prompt_token_ids=tuple(map(operator.index, request.prompt_token_ids)))  # not NumPy's
        self.check(request)
        self._answers.open(request, lambda s: self._porter.bring(s, self._schedulers))
        self._note_moment()

    def abort(self, request_id: str) -> None:
        """Also of one that is answered: its pages are not on offer any more."""
        self._answers.abort(request_id)
        self._porter.forget(request_id)
        self._note_moment()

    def step(self) -> list[Output]:
        self._check_whole()
        try:
            return self._step()
        except BaseException as error:  # Ctrl-C too: the others must not take the next word for the missing one
            self._failure = error
            self._together.leave()
            raise

    def recover(self) -> list[Output]:
        if self.many:
            raise RuntimeError("processes that share a mesh can't go on after a failed step; start them again")
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._model)):
            raise RuntimeError("the step failed while experts were moved, and their weights are lost; load them again")
        self._ongoing = None
        waiting = self._schedulers.restart(self._make_pool)
        reason = f"the engine failed in a step: {self._failure!r}"
        lost = list(self._answers.lose(waiting, reason))
        outputs = [*self._said, *lost]
        for output in lost:
            self._porter.forget(output.request_id)
        self._empty()
        self._failure, self._said = None, []
        self._note_moment()
        return outputs

    def withdraw(self) -> None:
        """No other engine will take the pages that are on offer now."""
        self._porter.withdraw()

    def expert_load(self) -> np.ndarray:
        """Tokens that each expert has got so far, int64 `[l, e]`; MTP modules last.

        Of many processes, all must ask.
        """
        now = self._devices.fetch(self._state.load).view(np.uint32)
        self._load_le += (now - self._load_seen).sum(axis=0, dtype=np.int64)  # the device's sums start again at 2**32
        self._load_seen = now
        return self._together.add_up(self._load_le)

    def reset_prefix_cache(self) -> None:
        """Forgets on the device what was computed of prompts, but for those that are being answered."""
        for scheduler in self._schedulers:
            scheduler.pool.clear()

    def rebalance(self, slots_lx: np.ndarray) -> None:
        """Moves experts to other ranks, in the course of the next steps; `slots_lx` is the expert in each slot.

        `parallel.placement` has what makes a placement from a load. No token changes, and nothing is compiled. Of many
        processes, any may ask. Raises ShardingError if the engine has no mesh, or the placement can't be reached.
        """
        if self._rebalancer is None:
            raise ShardingError("experts are moved between the ranks of a mesh; this engine has none, or no experts")
        self._rebalancer.ways(slots_lx)
        self._aim = slots_lx

    def _empty(self) -> None:
        """What the device keeps of sequences, before there is one."""
        cfg, options = self.cfg, self.options
        columns = -(-self.max_model_len // options.page_size)
        self._table = SlotTable(options.max_num_seqs, columns, self._eos_ids, self._devices)
        self._state: Any = None  # there is no room for two
        self._state = empty_state(cfg, options, self._model.embed.dtype, self._devices)
        self._load_seen = self._devices.fetch(self._state.load).view(np.uint32)

    def _check_whole(self) -> None:
        """What a step that failed halfway has left can't be trusted: neither the plan nor the arrays it took over."""
        if self._failure is not None:
            raise RuntimeError(
                "the engine has failed in an earlier step; recover it, or make another one"
            ) from self._failure

    def _step(self) -> list[Output]:
        clock = [time.perf_counter()]
        self._said += self._porter.said()
        missed = (self._answers.miss(s, why) for s, why in self._porter.receive(self._schedulers))
        self._said += self._porter.passed(missed)
        plans = self._plan()
        if self._rebalancer and self._rebalancer.busy:
            self._model = self._rebalancer.advance(self._model, self._programs[move])
        ongoing, self._ongoing = self._ongoing, self._launch(plans)
        idle = ongoing is None or ongoing.last.is_ready()
        clock.append(time.perf_counter())
        if ongoing:
            jax.block_until_ready(ongoing.last)
        clock.append(time.perf_counter())
        if ongoing and not idle:
            self._round_seconds += 0.2 * ((clock[2] - self._came) / ongoing.rounds - self._round_seconds)
        for output in self._porter.passed(self._read(ongoing)) if ongoing else ():
            self._said.append(output)
        outputs, self._said = self._said, []
        if not self.busy:
            self._ongoing = None  # nobody wants to know
        if not (ongoing or self._ongoing or outputs or any(plan.fills for plan in plans)):
            self._porter.rest()
        self._count(*clock, idle_since=(self._came if ongoing else clock[0]) if idle else clock[1])
        return outputs

    def _make_shapes(self) -> Shapes:
        """The shapes of steps: on a mesh, prompts are shared by the ranks, and rows are those of each."""
        sizes = self.options.max_num_batched_tokens, self.options.max_num_seqs
        if self._devices.mesh is None:
            return Shapes.of(*sizes)
        return Shapes.over(self._devices.count, *sizes, self.max_model_len, self.options.num_microbatches)

    def _limits(self) -> Limits:
        o = self.options
        return Limits(
            slots=o.max_num_seqs,
            tokens=o.max_num_batched_tokens,
            tile=self._shapes.tile,
            drafts=self.drafts,
            queued=o.max_num_queued,
            share=o.enable_prefix_caching,
            aligned=self._devices.mesh is not None,
            filled=FILLED,
        )

    # Launching a step: nothing is waited for.

    def _call(self, shape: Any) -> Call:
        """The program of a shape, or one that has but one, and what it is for."""
        mesh, ranks = self._devices.mesh, self._ranks
        if shape is mark:
            return Call(mark, mesh, ranks, (self._state.slots, *self._packer.marks()))
        if shape is move:
            none = self._devices.same(np.full(MOVES, np.iinfo(np.int32).max, np.int32))
            return Call(move, mesh, ranks, (mixtures(self._model)[0].experts, none, none))
        given = self._model, self._state, self._table.on_device()
        static = {"cfg": self.cfg, "drafts": self.drafts}
        return call_of(shape, given, self._packer, self._gate, self._devices, ranks, **static)

    def _plan(self) -> list[Plan]:
        """What each rank of this process does in the next step, which all processes make."""
        ranks, aim = self._schedulers, None if self._aim is None else self._aim.tolist()
        wish = Wish(ranks.allowed(self._rounds()), ranks.wanted(), bool(self._answers), aim)
        wishes, self._aim = self._together.wishes(wish), None
        self._company = self.many and any(each.open for each in wishes)
        self._aim_at(next((each.slots_lx for each in wishes if each.slots_lx is not None), None))
        rounds = min(each.rounds for each in wishes)
        if self._devices.mesh is None:
            return ranks.schedule(rounds)
        tiles = ranks.limits.tokens // self._shapes.tile
        room = Room(tiles, max(shape.past for shape in self._shapes.prefill))
        return ranks.schedule(rounds, self._together.room(room, wishes).within(wish.room))

    def _aim_at(self, slots_lx: list[list[int]] | None) -> None:
        """Sets the placement that a process has asked for; whoever asked has checked it, but others were moving."""
        if self._rebalancer is None or slots_lx is None:
            return
        try:
            self._rebalancer.aim(np.array(slots_lx))
        except ShardingError as error:
            warnings.warn(f"a placement of experts is not taken: {error}", stacklevel=2)

    def _launch(self, plans: list[Plan]) -> Launched | None:
        fills = (fill for plan in plans for fill in plan.fills)
        self._state = self._state._replace(cache=self._porter.fill(self._state.cache, fills))
        chunks, rows = [c for plan in plans for c in plan.chunks], [s for plan in plans for s in plan.rows]
        marks_r = [self._seat(plan.chunks) for plan in plans]
        for s in (*(chunk.sequence for chunk in chunks), *rows):
            self._table.pages(s)
        guides = self._answers.guides([*(c.sequence for c in chunks if c.completes), *rows])
        pieces = [Piece.of(chunk, self._devices.here.start) for chunk in chunks]
        most = max(len(plan.rows) for plan in plans), max(map(len, marks_r))
        step = self._together.share(Share(pieces, *most, entwined(chunks, self.options.page_size), plans[0].rounds))
        if not (step.pieces or step.rows):
            return None
        self._mark(marks_r, step.marks)
        nothing: dict[int, Sequence] = {}
        packed, firsts, prefilled = self._prefill(step, guides) if step.pieces else ([], nothing, None)
        numbers, chosen = self._decode(plans, step.rows, guides) if step.rows else (nothing, None)
        return Launched(tuple(packed), _rows(firsts), prefilled, _rows(numbers), chosen, plans[0].rounds)

    def _seat(self, chunks: Iterable[Chunk]) -> list[Mark]:
        """Tells the device of sequences that have got a slot; gives what it is still to be told of some."""
        marks = []
        for s in (chunk.sequence for chunk in chunks if chunk.first):
            self._answers.begin(s)
            bias_u = self._guides.bias(s.request.params)
            self._table.start(s, biased=bias_u is not None)
            if bias_u is not None or s.request.params.penalizes:
                marks.append(Mark(s, bias_u))
        return marks

    def _mark(self, marks_r: list[list[Mark]], times: int) -> None:
        """Tells each rank of one sequence after another, all ranks at a time."""
        for number in range(times):
            marks = self._packer.marks(marks[number] for marks in marks_r if number < len(marks))
            self._state = self._state._replace(slots=self._programs[mark](self._state.slots, *marks))

    def _prefill(self, step: Share, guides: dict[Sequence, Guide]) -> tuple[list[Spot], dict[int, Sequence], Prefilled]:
        shape, packed = self._packer.arrange(step.pieces, self._shapes, divisible=not step.entwined)
        fill = self._packer.shared_chunks if self._devices.mesh else self._packer.chunks
        pack, masks = fill(packed, shape, guides)
        result, self._state = self._programs[shape](self._model, self._state, self._table.on_device(), pack, masks)
        first_row = self._packer.rows_each(shape) * self._devices.here.start
        return packed, completed(packed, first_row), _send(result)

    def _decode(
        self, plans: list[Plan], most: int, guides: dict[Sequence, Guide]
    ) -> tuple[dict[int, Sequence], Chosen]:
        shape = self._shapes.for_rows(most)
        numbers = row_numbers([plan.rows for plan in plans], shape)
        rows_s, masks = self._packer.rows(numbers, shape, guides)
        given = (self._table.on_device(), rows_s, masks, self._gate, self._packer.number(plans[0].rounds))
        result, self._state = self._programs[shape](self._model, self._state, *given)
        return numbers, _send(result)

    def _rounds(self) -> int:
        """As many as take about as long as people and new requests may wait."""
        return max(1, min(ROUNDS, int(PATIENCE / max(self._round_seconds, 1e-6))))

    # Reading a step.

    def _read(self, step: Launched) -> Iterable[Output]:
        if step.prefilled is not None:
            self._read_known(step.spots, step.prefilled.known)
            yield from self._answers.grow(step.completed, Reading(step.prefilled.chosen, None, self._devices.fetch))
        if step.chosen is not None:
            yield from self._answers.grow(step.rows, Reading(step.chosen, step.rounds, self._devices.fetch))

    def _read_known(self, spots: tuple[Spot, ...], known: Logprobs) -> None:
        """Notes how probable the prompts' tokens were, where that is asked for; any rank may have computed them."""
        if any(spot.piece.reported for spot in spots):
            whole = self._devices.fetch_all(tuple(known))
            report = Logprobs(*(column.reshape(-1, *column.shape[2:]) for column in whole))  # of all microbatches
            self._answers.note_known(spots, report)

    def _count(self, began: float, launched: float, come: float, idle_since: float) -> None:
        now, c = time.perf_counter(), self.counters
        c.steps += 1
        c.schedule_seconds += launched - began
        c.device_seconds += come - launched
        c.read_seconds += now - come
        c.step_seconds += now - began
        c.exposed_seconds += launched - idle_since
        self._came = come
        self._note_moment()

    def _note_moment(self) -> None:
        c, ranks = self.counters, self._schedulers
        c.waiting, c.running = ranks.num_waiting, sum(len(s.running) for s in ranks)
        c.preemptions, c.pages_used = sum(s.preemptions for s in ranks), sum(s.pool.used for s in ranks)
        c.prompt_tokens, c.cached_tokens = sum(s.queried for s in ranks), sum(s.hit for s in ranks)
        c.late_compiled, c.tiers = self._programs.late, self._porter.tiers
        c.handovers_missed, c.pages_dropped = self._porter.missed, self._porter.dropped


def _checksum(model: Model) -> int:
    """Of a part of the weights that all processes have."""
    parts = (leaf.addressable_shards[0].data for leaf in (model.norm, model.embed))
    return zlib.crc32(b"".join(np.asarray(part[:64]).tobytes() for part in parts))


def _rows(numbers: dict[int, Sequence]) -> tuple[Row, ...]:
    """Sequences by their rows in a step, as they are now."""
    return tuple(Row(s, s.epoch, number) for number, s in numbers.items())


def _send(result: Any) -> Any:
    """Starts the way back to the host, which takes time on some devices; few want the log-probabilities."""
    chosen = result.chosen if isinstance(result, Prefilled) else result
    for leaf in jax.tree.leaves(chosen._replace(report=None)):
        leaf.copy_to_host_async()
    return result
