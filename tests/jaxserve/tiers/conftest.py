"""Real servers for the shared tier, and values that tell where they belong."""

import hashlib
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError

from tests.processes import free_ports, freeze
from tests.waiting import SOON, eventually

PROGRAM = shutil.which("valkey-server") or shutil.which("redis-server")


def value_of(namespace: str, key: bytes, size: int = 100) -> memoryview:
    """What is put under a key: of another key, it is another."""
    return memoryview(hashlib.shake_128(repr((namespace, key)).encode()).digest(size)).toreadonly()


class Server:
    """A process on a port of its own; it keeps nothing when it ends."""

    def __init__(self, folder: Path, port: int, *options: str):
        assert PROGRAM
        folder.mkdir()
        self.port = port
        self._command = [PROGRAM, "--port", str(self.port), "--dir", str(folder), "--save", "", *options]
        self._command += ["--bind", "127.0.0.1", "--appendonly", "no", "--loglevel", "warning"]
        self.client = Redis(port=self.port)
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        assert eventually(self.answers)

    def answers(self) -> bool:
        """Not another that has its port."""
        try:
            about: Any = self.client.info("server")
            return about["process_id"] == self._process.pid
        except RedisError:
            return False

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(SOON)

    def freeze(self) -> None:
        freeze(self._process)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.client.close()
        self.kill()


def start(stack: ExitStack, folder: Path, port: int, *options: str) -> Server:
    """A server until the end of a test."""
    if PROGRAM is None:
        pytest.skip("there is no valkey-server or redis-server on this machine")
    server = Server(folder, port, *options)
    stack.callback(server.close)
    return server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with ExitStack() as stack:
        yield start(stack, tmp_path / "server", *free_ports(1))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[Server]]:
    """Three nodes, each with a third of the slots."""
    with ExitStack() as stack:
        ports = free_ports(6)
        options = ["--cluster-enabled", "yes", "--cluster-require-full-coverage", "no", "--cluster-port"]
        nodes = [start(stack, tmp_path / str(n), ports[n], *options, str(ports[3 + n])) for n in range(3)]
        for number, node in enumerate(nodes):
            node.client.execute_command("CLUSTER ADDSLOTSRANGE", 16384 * number // 3, 16384 * (number + 1) // 3 - 1)
            node.client.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port, ports[3])
        assert eventually(lambda: all(knows_all(node) for node in nodes))
        yield nodes


def knows_all(node: Server) -> bool:
    info: Any = node.client.execute_command("CLUSTER INFO")
    text = info if isinstance(info, dict) else dict(line.split(":") for line in info.decode().split())
    return text["cluster_slots_assigned"] == "16384" and text["cluster_state"] == "ok"
