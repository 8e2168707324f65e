"""What faults cost a fleet: how soon they are noticed, how long answers pause, and whether they are the same.

`python -m benchmarks.faults` starts a router, two instances for prompts and two for answers, all of the embedded model
and processes of their own, and a server that they share for their context cache. While clients stream answers without
a break, one of these processes is killed, stopped, or made to hang, several times each; medians, with the greatest.
"""

import itertools
import random
import re
import secrets
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

import httpx2
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from benchmarks import stores
from jaxserve.client import Client
from jaxserve.fleet.children import Child
from jaxserve.parallel.errors import ServerError

PROMPTS = 16
SIZE = {"max_model_len": 1024, "max_num_seqs": 8, "cache_gb": 0.5}
PLANTED = """
import signal, threading
from jaxserve.cli.main import main
from jaxserve.engine import Engine
well, step = threading.Event(), Engine.step
well.set()
signal.signal(signal.SIGUSR1, lambda *_: well.clear())
signal.signal(signal.SIGUSR2, lambda *_: well.set())
Engine.step = lambda self: (well.wait(), step(self))[1]
main()
"""
"""`jaxserve`, whose engine hangs from one signal to the other; the rest of the process goes on."""
INSTANCES = {f"{role}-{number}": role for role in ("prefill", "decode") for number in (1, 2)}
START_UP = 120.0
LOST = r"-1 is lost"
LONGEST = 30.0
"""Seconds in which a fault is noticed."""


class Answer(NamedTuple):
    """An answer as its client got it."""

    number: int  # of the prompt
    text: str | None  # None: it ended with an error
    times: list[float]  # when it was asked, and when its pieces came

    def pause(self, since: float) -> float:
        """Seconds of the longest pause that was not over before."""
        return max((b - a for a, b in itertools.pairwise(self.times) if b > since), default=0.0)


def bodies() -> list[dict[str, Any]]:
    """What is asked: random prompts, in turn greedy and drawn."""
    rng = random.Random(0)
    ways = {"temperature": 0}, {"temperature": 1.0, "seed": 11}
    prompts = [[rng.randrange(2, 500) for _ in range(rng.randint(100, 400))] for _ in range(PROMPTS)]
    return [
        {"prompt": prompt, "max_tokens": 256, "ignore_eos": True} | ways[number % len(ways)]
        for number, prompt in enumerate(prompts)
    ]


def ask(client: Client, number: int, body: dict[str, Any]) -> Answer:
    """Streams an answer; nothing of its prompt is known, whoever asked it before."""
    times, text = [time.perf_counter()], ""
    try:
        for chunk in client.stream("/v1/completions", body | {"cache_salt": secrets.token_hex(8)}):
            times.append(time.perf_counter())
            text += "".join(choice["text"] for choice in chunk["choices"])
    except ServerError:
        return Answer(number, None, [*times, time.perf_counter()])
    return Answer(number, text, times)


@contextmanager
def asking(url: str, clients: int) -> Iterator[list[Answer]]:
    """Has so many clients ask without a break; at the end, all that was asked is answered."""
    asked, numbers, answers, enough = bodies(), itertools.count(), list[Answer](), threading.Event()

    def run() -> None:
        with Client(url) as client:
            while not enough.is_set():
                number = next(numbers) % PROMPTS
                answers.append(ask(client, number, asked[number]))

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(run) for _ in range(clients)]
        try:
            yield answers
        finally:
            enough.set()
        for each in running:
            each.result()


class Processes:
    """A router and its instances, and what they say."""

    def __init__(self, router: dict[str, Any], instances: dict[str, Any]):
        """Both are options of `jaxserve serve`; returns when all are there."""
        self._secret, self._options = {"JAXSERVE_FLEET_TOKEN": secrets.token_hex(16)}, instances
        self._lines, self._come = list[tuple[float, str]](), threading.Condition()
        self.children = dict[str, Child]()
        own = {"role": "router", "port": 0, "control_port": 0, "max_model_len": SIZE["max_model_len"]}
        self._begin("router", ["-m", "jaxserve"], ["--no-log-requests", *_words(own | router)])
        self.url = self.wait_for(r"is served at (\S+)")[1]
        for name in INSTANCES:
            self.begin(name)
        self.wait_until_whole()

    def begin(self, name: str) -> None:
        """Starts an instance."""
        own = {"role": INSTANCES[name], "name": name, "router": self.children["router"].address}
        self._begin(name, ["-c", PLANTED], _words(SIZE | own | self._options))

    def kill(self, name: str) -> None:
        self.children[name].signal(signal.SIGKILL)
        self.children[name].wait()

    def close(self) -> None:
        for name in self.children:
            self.kill(name)

    def wait_for(self, pattern: str, since: float = 0.0) -> tuple[float, str]:
        """When a line was said that has the pattern, not before `since`; and its first group."""
        end, seen = time.perf_counter() + LONGEST, 0
        with self._come:
            while time.perf_counter() < end:
                for when, line in self._lines[seen:]:
                    if when >= since and (found := re.search(pattern, line)):
                        return when, found[found.re.groups]
                seen = len(self._lines)
                self._come.wait(1.0)
        raise SystemExit("\n".join([*(line for _, line in self._lines[-20:]), f"nobody has said {pattern!r}"]))

    def metrics(self) -> dict[tuple[str, ...], float]:
        """The router's, by name and labels."""
        families = text_string_to_metric_families(httpx2.get(f"{self.url}/metrics").text)
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}

    def wait_until_whole(self) -> None:
        """Until all instances are there and well."""
        end, name = time.perf_counter() + START_UP, "jaxserve:fleet_instances"
        while time.perf_counter() < end:
            found = self.metrics()
            if found.get((name, "prefill", "healthy")) == found.get((name, "decode", "healthy")) == 2:
                return
            time.sleep(0.2)
        raise SystemExit("\n".join([*(line for _, line in self._lines[-20:]), "an instance does not come"]))

    def _begin(self, name: str, program: list[str], words: list[str]) -> None:
        self.children[name] = child = Child(name, [sys.executable, *program, "serve", *words], self._secret, self._hear)
        if name == "router":
            child.told.wait()

    def _hear(self, name: str, line: str) -> None:
        with self._come:
            self._lines.append((time.perf_counter(), line))
            self._come.notify()


def _words(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


class Fault(NamedTuple):
    """Something that happens, and its end."""

    what: str
    strike: Callable[[], object]
    mend: Callable[[], object]
    line: str | None = LOST  # what is said when it is noticed
    clients: int = 10
    after: float = 1.5  # seconds that clients have been asking


class Turn(NamedTuple):
    """What became of it."""

    noticed: float | None  # seconds from the fault until the router knew
    moved: int  # answers that another instance went on with
    recovery: float | None  # seconds from then until it did, their mean
    pause: float  # seconds of the longest pause of a stream
    answers: int  # that were open, or were asked later
    failed: int
    unlike: int


def faults(fleet: Processes, server: stores.Server | None) -> list[Fault]:
    """All of them; the first is none."""
    signalled = lambda name, number: lambda: fleet.children[name].signal(number)  # noqa: E731
    killed = lambda name: (lambda: fleet.kill(name), lambda: fleet.begin(name))  # noqa: E731
    stopped = lambda name: (signalled(name, signal.SIGSTOP), signalled(name, signal.SIGCONT))  # noqa: E731
    nothing = lambda: None  # noqa: E731
    found = [
        Fault("nothing", nothing, nothing, None),
        Fault("prefill killed at work", *killed("prefill-1"), after=0.2),
        Fault("decode killed", *killed("decode-1")),
        Fault("decode stopped", *stopped("decode-1")),
        Fault("decode's engine hangs", signalled("decode-1", signal.SIGUSR1), signalled("decode-1", signal.SIGUSR2)),
        Fault("nothing, many ask", nothing, nothing, None, clients=28),
        Fault("prefill stopped, many ask", *stopped("prefill-1"), clients=28),
    ]
    if server:
        found.append(Fault("store killed", server.kill, server.start, None))
        found.append(Fault("store stopped", server.stop, server.go_on, None))
    return found


def turn(fleet: Processes, fault: Fault, expected: Sequence[str | None]) -> Turn:
    """Has it happen while clients ask, and waits until all is well."""
    before = fleet.metrics()
    with asking(fleet.url, fault.clients) as answers:
        time.sleep(fault.after)
        since = time.perf_counter()
        fault.strike()
        noticed = fleet.wait_for(fault.line, since)[0] - since if fault.line else None
        time.sleep(1.0 if fault.line else 3.0)
    after = fleet.metrics()
    fault.mend()
    fleet.wait_until_whole()
    count, seconds = (
        after[name,] - before[name,] for name in map("jaxserve:fleet_recovery_seconds_{}".format, ("count", "sum"))
    )
    since_then = [answer for answer in answers if answer.times[-1] > since]
    return Turn(
        noticed=noticed,
        moved=int(count),
        recovery=seconds / count if count else None,
        pause=max(answer.pause(since) for answer in since_then),
        answers=len(since_then),
        failed=sum(answer.text is None for answer in answers),
        unlike=sum(answer.text not in (None, expected[answer.number]) for answer in answers),
    )


def undisturbed(url: str) -> list[str | None]:
    """The text of each answer."""
    with Client(url) as client, ThreadPoolExecutor(8) as pool:
        return [answer.text for answer in pool.map(lambda each: ask(client, *each), enumerate(bodies()))]


def main(
    turns: Annotated[int, typer.Option(min=1, help="How often each happens.")] = 3,
    heartbeat: Annotated[float, typer.Option(help="Seconds between two signs of an instance.")] = 0.5,
    dead_after: Annotated[float, typer.Option(help="Seconds without a sign, then an instance is lost.")] = 5.0,
    hung_after: Annotated[float, typer.Option(help="Seconds at work without a step, then it is lost.")] = 5.0,
    only: Annotated[str, typer.Option(help="Faults that have this in their name.")] = "",
) -> None:
    """Prints seconds until faults are noticed, until others go on, and of the longest pause that a client saw."""
    patience = {"heartbeat": heartbeat, "dead_after": dead_after, "hung_after": hung_after}
    errors = Console(stderr=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # its processes end with it
    with stores.server() as server, _started(patience, server) as fleet:
        errors.print("all instances are there")
        expected, found = undisturbed(fleet.url), dict[str, list[Turn]]()
        chosen = [fault for fault in faults(fleet, server) if only in fault.what]
        for fault in track(chosen * turns, "faults", console=errors):
            found.setdefault(fault.what, []).append(seen := turn(fleet, fault, expected))
            errors.print(f"{fault.what}: {seen.moved} of {seen.answers} answers moved, a pause of {seen.pause:.2f} s")
    Console().print(as_table(found, turns, patience))
    if server is None:
        errors.print(f"no faults of a store: none of {', '.join(stores.PROGRAMS)} is installed")


@contextmanager
def _started(patience: dict[str, Any], server: stores.Server | None) -> Iterator[Processes]:
    kept = {"context_cache": server.url, "context_cache_memory_gb": 0} if server else {}
    fleet = Processes(patience, kept)
    try:
        yield fleet
    finally:
        fleet.close()


def as_table(found: dict[str, list[Turn]], turns: int, patience: dict[str, float]) -> Table:
    """Medians of turns, the greatest in brackets; how many of all answers moved, and how many failed or differ."""
    given = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in patience.items())
    numbers = (Column(name, no_wrap=True) for name in ("noticed", "went on", "pause", "moved", "wrong"))
    table = Table(
        "what happens", *numbers,
        title=f"seconds, median (greatest) of {turns} turns; {given}",
    )  # fmt: skip
    for what, seen in found.items():
        seconds = ([getattr(each, name) for each in seen] for name in ("noticed", "recovery", "pause"))
        moved, answers = (sum(getattr(each, name) for each in seen) for name in ("moved", "answers"))
        wrong = sum(each.failed + each.unlike for each in seen)
        table.add_row(what, *map(_spread, seconds), f"{moved} of {answers}", str(wrong))
    return table


def _spread(seconds: Sequence[float | None]) -> str:
    known = [each for each in seconds if each is not None]
    return f"{statistics.median(known):.2f} ({max(known):.2f})" if known else "–"


if __name__ == "__main__":
    typer.run(main)
