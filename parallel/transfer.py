"""Cache pages from the ranks of one mesh to those of another, in this process or others.

A `Sender` offers arrays under a name; they wait until a `Receiver` that has room asks for them. Each pair has a link of
its own: one that stalls delays no other (arXiv:2508.02520, section 5.1).
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxserve.parallel.carriers import Implementation, Spec, carriers
from jaxserve.parallel.errors import ShardingError, TransferError
from jaxserve.parallel.frames import Frame, Frames, dial
from jaxserve.parallel.gates import Gate
from jaxserve.parallel.links import Counts, End, Health, Kind
from jaxserve.parallel.offers import Offers

PULLS = 64
"""What a receiver may ask of a link before the first has come."""


def serving_rank(dp_rank: int, tp_rank: int = 0, *, prefill_tp: int, decode_dp: int, decode_tp: int = 1) -> int:
    """The rank of a prefill instance that a rank of a decode instance gets its pages from.

    All ranks of the prefill instance have the pages, or can: each then serves as many as any other, or one fewer where
    the numbers don't divide (arXiv:2506.12708, section 4.3.3). Raises ShardingError if there are no such ranks.
    """
    if prefill_tp % decode_tp:
        raise ShardingError(f"prefill_tp {prefill_tp} is not a multiple of decode_tp {decode_tp}")
    if not (0 <= dp_rank < decode_dp and 0 <= tp_rank < decode_tp):
        raise ShardingError(f"a decode instance of {decode_dp} x {decode_tp} has no rank ({dp_rank}, {tp_rank})")
    group = dp_rank * (prefill_tp // decode_tp) // decode_dp
    return group * decode_tp + tp_rank


class Sender:
    """Offers arrays to the receivers that know its token, and gives each offer once.

    At most `limit` bytes are on offer, each for the time that was said with it. Offers may be made by any thread, and
    none of its methods waits for a receiver, but `probe`.
    """

    def __init__(
        self, token: bytes, limit: int, *, host: str = "127.0.0.1", port: int = 0, patience: float = 10.0,
        implementation: Implementation | None = None,
    ):  # fmt: skip
        """Listens at `host`; a link in which nothing moves for `patience` seconds while something should is closed.

        Raises OSError if it can't listen there, NotImplementedError if there is no such implementation.
        """
        self._make_carrier, self._implementation = carriers(implementation), implementation or "sockets"
        self._make_carrier(host)  # fails now, if it does
        self.offers, self._links, self._counts = Offers(limit), dict[str, Giver](), dict[str, Counts]()
        self._lock = threading.Lock()
        self._gate = Gate(host, port, token, patience, self._serve, "transfer link", self.offers.expire)
        self.address = self._gate.address

    def offer(self, name: str, tree: Any, *, seconds: float = 60.0) -> bool:
        """Whether there is room for a tree of arrays; if so, it is held until it is taken, or for so many seconds.

        Arrays of a device are read when they are asked for, so they need not be there yet; none may be donated
        meanwhile. Raises TransferError, `refused`, if it never fits.
        """
        return self.offers.add(name, jax.tree.leaves(tree), seconds)

    def withdraw(self, name: str) -> None:
        """Nobody will get it any more; fine if it is not offered."""
        self.offers.remove(name)

    @property
    def counts(self) -> dict[str, Counts]:
        """By receiver, over all its links."""
        return dict(self._counts)

    def probe(self, receiver: str, timeout: float) -> Health:
        """How a receiver is: one that is `full` will come for its pages later, one that is `dead` will not."""
        link = self._links.get(receiver)
        return link.probe(timeout) if link else "dead"

    def close(self) -> None:
        """Ends all links; what is on offer is thrown away."""
        self._gate.close()
        for link in list(self._links.values()):
            link.close()
        self.offers.clear()

    def _serve(self, frames: Frames) -> None:
        try:
            link = self._welcome(frames)
        except (TransferError, LookupError, TypeError):  # words of someone who speaks otherwise
            frames.close()
            return
        if self._gate.closed:  # while it was let in
            link.close()
        link.run()

    def _welcome(self, frames: Frames) -> "Giver":
        words = frames.expect().words
        name, theirs = words["name"], words["implementation"]
        if theirs != self._implementation:
            reason = f"the sender has implementation={self._implementation!r}, the receiver {theirs!r}: give both one"
            frames.send(Kind.REFUSED, {"reason": reason})
            raise TransferError(reason, "refused")
        link = Giver(frames, name, self.offers, self._make_carrier(self.address[0]))
        with self._lock:
            link.counts = self._counts.setdefault(name, Counts())
            before, self._links[name] = self._links.get(name), link
        if before:
            before.close()
        frames.send(Kind.HELLO, {})
        return link


class Given(NamedTuple):
    """What was sent, and is kept until the other end has it."""

    nbytes: int
    deadline: float


class Giver(End):
    """A sender's end of a link."""

    def __init__(self, frames: Frames, peer: str, offers: Offers, carrier: Any):
        super().__init__(frames, peer, lambda: 1)
        self._offers, self._carrier, self._given = offers, carrier, dict[str, Given]()

    def _tick(self) -> None:
        late = [name for name, given in self._given.items() if given.deadline < time.monotonic()]
        if late:
            raise TransferError(f"the receiver has not said in time that it has {late[0]}", "late")

    def _hear(self, frame: Frame) -> None:
        name = frame.words["name"]
        if frame.kind == Kind.PULL:
            self._give(name, frame.words["arrays"], time.monotonic() + frame.words["seconds"])
        elif frame.kind == Kind.TAKEN:
            self.counts.pulls += 1
            self.counts.nbytes += self._given.pop(name).nbytes
            self._carrier.settle(name, taken=True)
            self._offers.remove(name)
        else:
            self.counts.damaged += 1
            self._return(name, taken=True)

    def _give(self, name: str, wanted: list[Any], deadline: float) -> None:
        try:
            arrays = self._arrays(name, wanted)
        except TransferError as error:
            self.counts.refused += 1
            self._frames.send(Kind.REFUSED, {"name": name, "reason": str(error), "kind": error.kind})
            return
        self._given[name] = Given(sum(array.nbytes for array in arrays), deadline)
        self._carrier.give(self._frames, Kind.PAGES, name, arrays)

    def _arrays(self, name: str, wanted: list[Any]) -> list[np.ndarray]:
        """What an offer holds, on the host; raises TransferError if it isn't there, or not what is wanted."""
        offer = self._offers.claim(name)
        try:
            arrays = [np.asarray(array) for array in offer.arrays]
        except RuntimeError as error:  # the program that was to make them has failed, or they are donated
            self._offers.remove(name)
            raise TransferError(f"{name} is lost: {error}", "gone") from error
        if (found := [_described(array) for array in arrays]) != wanted:
            self._offers.put_back(name)
            raise TransferError(f"{name} is {found}; the receiver asks for {wanted}", "refused")
        return arrays

    def _return(self, name: str, taken: bool) -> None:
        del self._given[name]
        self._carrier.settle(name, taken)
        self._offers.put_back(name)

    def _end(self, error: TransferError) -> None:
        for name in list(self._given):
            self._return(name, taken=False)


class Wanted(NamedTuple):
    """What a receiver has asked for."""

    specs: list[Spec]
    tree: Any  # what they are the leaves of
    deadline: float
    future: Future[Any]


class Receiver(End):
    """A receiver's end of a link: takes what a sender offers, when its owner has room for it."""

    def __init__(
        self, address: tuple[str, int], token: bytes, name: str, *, room: Callable[[], int] = lambda: 1,
        patience: float = 10.0, implementation: Implementation | None = None,
    ):  # fmt: skip
        """Connects to a sender, which knows this end by its `name`; `room` is what the sender's probes are told.

        Raises TransferError: `dead` if nobody answers, `refused` if the two have other tokens or implementations.
        """
        make, connection = carriers(implementation), dial(address, patience)
        host = connection.getsockname()[0]
        super().__init__(Frames(connection, patience), f"{address[0]}:{address[1]}", room)
        self._lock, self._wanted = threading.Lock(), dict[str, Wanted]()
        try:
            self._carrier = make(host)
            self._frames.enter(token)
            self._frames.send(Kind.HELLO, {"name": name, "implementation": implementation or "sockets"})
            answer = self._frames.expect()
            if answer.kind != Kind.HELLO:
                raise TransferError(answer.words["reason"], "refused")
        except (TransferError, NotImplementedError):
            self._frames.close()
            raise
        threading.Thread(target=self.run, name="transfer link", daemon=True).start()

    def pull(self, name: str, like: Any, timeout: float) -> Future[Any]:
        """Asks for an offer: a tree of arrays as `like` describes it (or of such arrays), on the host.

        The future has it, or a TransferError. A deadline that passes ends the link, and with it all that was asked
        for: what is on its way can't be told from what will never come. Raises TransferError if the link has ended
        (`dead`), or too much is asked for already (`refused`).
        """
        leaves, tree = jax.tree.flatten(like)
        specs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
        wanted = Wanted(specs, tree, time.monotonic() + timeout, Future())
        wanted.future.set_running_or_notify_cancel()  # can't be cancelled: what was asked for comes
        with self._lock:
            if self.failure:
                raise TransferError(str(self.failure), "dead")
            if name in self._wanted or len(self._wanted) == PULLS:
                raise TransferError(f"{name}: asked for already, or {PULLS} others are", "refused")
            self._wanted[name] = wanted
        asked = {"name": name, "arrays": [_described(spec) for spec in specs], "seconds": timeout}
        self._frames.send(Kind.PULL, asked)
        return wanted.future

    def _tick(self) -> None:
        with self._lock:
            late = [name for name, wanted in self._wanted.items() if wanted.deadline < time.monotonic()]
        if late:
            raise TransferError(f"{late[0]} did not come in time", "late")

    def _hear(self, frame: Frame) -> None:
        name = frame.words["name"]
        wanted = self._wanted[name]
        if frame.kind == Kind.REFUSED:
            self.counts.refused += 1
            self._finish(name).set_exception(TransferError(frame.words["reason"], frame.words["kind"]))
            return
        try:
            arrays = self._carrier.take(self._frames, frame.words, wanted.specs, wanted.deadline)
        except TransferError as error:
            if error.kind != "damaged":
                raise
            self.counts.damaged += 1
            self._frames.send(Kind.DAMAGED, {"name": name})
            self._finish(name).set_exception(error)
            return
        self.counts.pulls += 1
        self.counts.nbytes += sum(array.nbytes for array in arrays)
        future = self._finish(name)
        try:
            self._frames.send(Kind.TAKEN, {"name": name})  # first: whoever has it may ask for the name again
        finally:
            future.set_result(wanted.tree.unflatten(arrays))  # also if the sender never hears of it

    def _finish(self, name: str) -> Future[Any]:
        with self._lock:
            return self._wanted.pop(name).future

    def _end(self, error: TransferError) -> None:
        with self._lock:
            ended, self._wanted = self._wanted, {}
        for wanted in ended.values():
            wanted.future.set_exception(error)


def _described(array: Any) -> list[Any]:
    return [list(array.shape), str(array.dtype)]
