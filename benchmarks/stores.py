"""A Valkey or Redis server in memory, for benchmarks of what many instances share."""

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from redis import Redis
from redis.exceptions import RedisError

PROGRAMS = "valkey-server", "redis-server"


class Server:
    """A server that can be killed, stopped and started again; what it had is lost then, its address stays."""

    def __init__(self, program: str, folder: str):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self._port = taken.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self._port}"
        options = {"port": self._port, "bind": "127.0.0.1", "save": "", "dir": folder, "loglevel": "warning"}
        self._command = [program, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
        self.start()

    def start(self) -> None:
        """Returns when it answers."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        for _ in range(100):
            try:
                Redis(port=self._port).ping()
                return
            except RedisError:
                time.sleep(0.1)
        raise SystemExit("the server of the shared tier does not answer")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """It answers nobody until `go_on`."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def server() -> Iterator[Server | None]:
    """A server, if there is a program for one."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        started = Server(program, folder)
        try:
            yield started
        finally:
            started.kill()
