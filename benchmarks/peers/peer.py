"""Who is compared, whether a library is there, and what it says."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers.job import Job

ROOT = Path(__file__).parents[2]


class Peer(NamedTuple):
    """A library, and how it holds the model that it is measured with."""

    name: str
    runner: str  # a module beside this one
    form: str  # as in `Job`
    called: str  # what the library calls it
    needs: tuple[str, ...] = ()  # modules
    install: str = ""  # a command, for an interpreter `python`


_PIP = "{python} -m pip install"
_NATIVE = "CMAKE_ARGS=-DGGML_NATIVE=ON"
_TRANSFORMERS = "torch transformers"
_LLAMA_CPP = "--no-binary llama-cpp-python llama-cpp-python"

PEERS = (
    Peer("jaxserve", "on_jaxserve", "int8", "INT8"),
    Peer("transformers", "on_transformers", "bfloat16", "BF16", ("torch", "transformers"), f"{_PIP} {_TRANSFORMERS}"),
    Peer("llama.cpp", "on_llama_cpp", "int8", "Q8_0", ("llama_cpp",), f"{_NATIVE} {_PIP} {_LLAMA_CPP}"),
    Peer("mlx-lm", "on_mlx", "int8", "8 bits", ("mlx", "mlx_lm"), f"{_PIP} 'mlx[cpu]' mlx-lm"),
)
"""jaxserve first, against which the others are put."""


class PeerError(Exception):
    """A runner failed; the message has its last words."""


def interpreter(peer: Peer, python: str) -> str:
    """This one for jaxserve; for the others the one that was named."""
    return python if peer.needs else sys.executable


def lacks(peer: Peer, python: str) -> list[str]:
    """The modules that a peer needs and that interpreter hasn't. Raises PeerError if it is none."""
    code = "import sys, importlib.util as i; print(*(n for n in sys.argv[1:] if not i.find_spec(n)))"
    command = [interpreter(peer, python), "-c", code, *peer.needs]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise PeerError(f"--python {python} is no interpreter that runs ({error}); name another") from None


def ask(peer: Peer, python: str, job: Job) -> Iterator[dict[str, Any]]:
    """What a runner says, line by line: its version, then of each batch an `Answer`'s fields, or the seconds expected.

    Raises PeerError if the runner fails.
    """
    command = [interpreter(peer, python), "-m", f"benchmarks.peers.{peer.runner}", json.dumps(job._asdict())]
    with tempfile.TemporaryFile("w+") as words:
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=words, text=True) as process:
            assert process.stdout is not None
            try:
                yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            words.seek(0)
            raise PeerError(f"{peer.name} ended with {process.returncode}: {_last(words.read())}")


def _last(words: str) -> str:
    return next((line for line in reversed(words.splitlines()) if line.strip()), "it said nothing")
