"""Processes that tests start."""

import os
import signal
import subprocess
from typing import Any


def freeze(process: subprocess.Popen[Any]) -> None:
    """Stops a process until SIGCONT; it has when this returns, for the signal alone takes its time."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
