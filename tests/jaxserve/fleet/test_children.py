"""Processes that are started and ended together; these ones are small."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from jaxserve.fleet.children import Children

ROUTER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("router ends", file=sys.stderr), sys.exit(0)))
print("instances join at here:7", file=sys.stderr, flush=True)
time.sleep(60)
"""
INSTANCE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print("joins", *sys.argv[1:], file=sys.stderr, flush=True)
time.sleep(60)
"""


class Show:
    """Runs children in a thread, and keeps what is told."""

    def __init__(self, router: str, instances: dict[str, str]):
        self.lines, self.statuses = [], []
        self.children = Children({"SECRET": "s"}, lambda name, line: self.lines.append((name, line)))
        commands = {name: [sys.executable, "-c", code] for name, code in instances.items()}
        given = [sys.executable, "-c", router], commands
        self.thread = threading.Thread(target=lambda: self.statuses.append(self.children.run(*given)))
        self.thread.start()

    def until(self, line):
        end = time.monotonic() + 60
        while line not in self.lines:
            assert time.monotonic() < end, self.lines
            time.sleep(0.01)

    def status(self):
        self.thread.join(60)
        return self.statuses[0]


def test_instances_are_told_where_to_join_and_end_after_the_router():
    show = Show(ROUTER, {"a": INSTANCE, "b": INSTANCE})
    show.until(("a", "joins --router here:7"))
    show.until(("b", "joins --router here:7"))
    show.children.end()
    assert show.status() == 0
    assert show.lines[-1] == ("router", "router ends")


def test_a_child_that_dies_is_told_and_the_others_go_on():
    show = Show(ROUTER, {"a": INSTANCE, "b": INSTANCE})
    show.until(("a", "joins --router here:7"))
    show.until(("b", "joins --router here:7"))
    os.kill(show.children._instances[0].process.pid, signal.SIGKILL)
    show.until(("a", "is gone: killed by SIGKILL; it is not started again"))
    assert not show.statuses
    show.children.end()
    assert show.status() == 0


@pytest.mark.parametrize(
    ("router", "instance", "line", "status"),
    [
        (ROUTER, "raise SystemExit(2)", ("router", "has no instance left"), 1),
        (ROUTER.replace("time.sleep(60)", "time.sleep(1)"), INSTANCE, ("router", "is gone: ended with status 0"), 1),
        ("raise SystemExit(2)", INSTANCE, ("router", "is gone: ended with status 2"), 2),
        ("import os; os.kill(os.getpid(), 9)", INSTANCE, ("router", "is gone: killed by SIGKILL"), 1),
    ],
)
def test_without_the_router_or_any_instance_all_end_with_a_status_that_says_so(router, instance, line, status):
    show = Show(router, {"a": instance})
    assert show.status() == status
    assert line in show.lines


HELD = """
import os, socket, sys
from jaxserve.fleet.children import watch_stdin
kept = socket.create_connection(("127.0.0.1", int(os.environ["PORT"])))
watch_stdin()
"""
HOLDER = """
import os, sys
from jaxserve.fleet.children import Children
children = Children({}, lambda *_: None)
children.run([sys.executable, "-c", sys.argv[1]], {"a": [sys.executable, "-c", sys.argv[2]]})
"""


def test_if_the_process_that_started_them_is_killed_they_end():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        given = [sys.executable, "-c", HOLDER, HELD + ROUTER, HELD + INSTANCE]
        holder = subprocess.Popen(given, env=os.environ | {"PORT": str(listener.getsockname()[1])})
        try:
            connections = [listener.accept()[0] for _ in range(2)]
        finally:
            holder.kill()
            holder.wait()
    for connection in connections:
        with connection:
            connection.settimeout(60)
            assert connection.recv(1) == b""  # of a process that has ended


def test_the_second_time_nothing_is_finished():
    stubborn = ROUTER.replace("signal.SIGTERM, ", "signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, ", 1)
    show = Show(stubborn.replace("sys.exit(0)))", "sys.exit(0))))"), {"a": INSTANCE.replace("sys.exit(3)", "0")})
    show.until(("a", "joins --router here:7"))
    show.children.end()
    time.sleep(0.3)
    assert not show.statuses
    show.children.end()
    assert show.status() == 0


def test_the_second_time_instances_that_hang_are_killed_though_the_router_has_ended():
    show = Show(ROUTER, {"a": INSTANCE.replace("sys.exit(3)", "0")})
    show.until(("a", "joins --router here:7"))
    show.children.end()
    show.until(("router", "router ends"))
    time.sleep(0.3)
    assert not show.statuses
    show.children.end()
    assert show.status() == 0
