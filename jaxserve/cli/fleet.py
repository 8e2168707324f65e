"""`jaxserve serve --role …`: a router, or an instance of a fleet."""

import os
import re
import socket
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

from jaxserve.cli.show import notes
from jaxserve.parallel.errors import EngineError, RequestError

if TYPE_CHECKING:
    import typer

    from jaxserve.llm import LLM
    from jaxserve.peers import Peers

ServeRole = Literal["prefill", "decode", "router"]
ANYWHERE = "0.0.0.0", "::"


class Group(NamedTuple):
    """Options of `serve` that have an effect in these roles alone; None: whoever does all."""

    roles: tuple[ServeRole | None, ...]
    reason: str
    names: str


GROUPS = (
    Group(
        (None, "prefill", "decode"),
        "it is for who has an engine; give it to the instances",
        "max_num_seqs max_num_batched_tokens num_speculative_tokens cache_gb dtype quantization kv_cache_dtype "
        "context_cache context_cache_memory_gb context_cache_disk_gb context_cache_shared_gb model_cache devices mesh",
    ),
    Group(
        (None, "router"),
        "it is for who is asked by clients; give it to the router",
        "port served_model_name api_key max_num_queued chat_template max_body_bytes max_prompt_tokens max_answers "
        "max_tokens max_concurrency allow_priority request_timeout step_timeout allowed_origin allowed_host "
        "ssl_certfile ssl_keyfile ssl_keyfile_password ssl_ca_certs",
    ),
    Group((None,), "a fleet serves one model", "loadable"),
    Group(
        ("router",),
        "it is for --role router",
        "control_host control_port heartbeat dead_after hung_after max_attempts",
    ),
    Group(("prefill", "decode"), "it is for --role prefill and --role decode", "name"),
    Group(("prefill", "decode", "router"), "it is for a part of a fleet, see --role", "fleet_token"),
)


def check_effect(role: ServeRole | None, given: Collection[str]) -> None:
    """Raises RequestError that names an option which was given, and has no effect in a role, or without another."""
    wrong = {name: group.reason for group in GROUPS if role not in group.roles for name in group.names.split()}
    for name in given:
        if name in wrong:
            where = f"with --role {role}" if role else "without --role"
            raise RequestError(f"--{name.replace('_', '-')} has no effect {where}: {wrong[name]}")
    check_sizes(given)


def check_sizes(given: Collection[str]) -> None:
    """Raises RequestError that names a size of the context cache which was given without one."""
    for name in given:
        if name.startswith("context_cache_") and "context_cache" not in given:
            raise RequestError(f"--{name.replace('_', '-')} has no effect without --context-cache, which says where")


def given_in(context: "typer.Context") -> list[str]:
    """Names of the options that were given on the command line."""
    source = context.get_parameter_source
    return [name for name in context.params if (found := source(name)) and found.name == "COMMANDLINE"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What part of a fleet a process is, by the options of its command."""

    role: ServeRole | None
    router: str | None
    host: str
    name: str | None
    control_host: str
    control_port: int
    token: str | None
    heartbeat: float
    dead_after: float
    hung_after: float
    max_attempts: int

    def check(self) -> None:
        """Raises RequestError that names an option which is missing, or has no effect."""
        instance = self.role in ("prefill", "decode")
        if instance != (self.router is not None):
            reason = "is missing: where do instances join?" if instance else "is for --role prefill and --role decode"
            raise RequestError(f"--router HOST:PORT {reason}")
        _, _, port = (self.router or ":1").rpartition(":")
        if self.router is not None and not (re.fullmatch(r".+:\d{1,5}", self.router) and 0 < int(port) < 1 << 16):
            raise RequestError(f"--router {self.router}: it must be host:port, like localhost:8001")
        if instance and self.host in ANYWHERE:
            raise RequestError(
                f"--host {self.host}: with --role {self.role} it is where other instances reach this one; give one "
                "address of this machine"
            )
        if self.dead_after <= self.heartbeat:
            raise RequestError(
                f"--dead-after {self.dead_after:g}: it must be more than --heartbeat, {self.heartbeat:g}"
            )
        if self.role and not self.token:
            raise RequestError(
                "--fleet-token or JAXSERVE_FLEET_TOKEN is missing: the router and its instances share one"
            )

    @property
    def instance(self) -> Literal["prefill", "decode"] | None:
        """The role of an instance; None for a router, or who does all."""
        return None if self.role == "router" else self.role


def open_router(
    part: Part, model: str | None, max_model_len: int | None, tell: Callable[[str], None], **options: Any
) -> "LLM":
    """A model that instances serve; `options` are those of the fleet."""
    from jaxserve.fleet.fleet import FleetOptions
    from jaxserve.fleet.health import Patience
    from jaxserve.fleet.router import RouterOptions, route

    patience = Patience(hung_after=part.hung_after, dead_after=part.dead_after)
    joining = RouterOptions(
        token=str(part.token).encode(),
        host=part.control_host,
        port=part.control_port,
        period=part.heartbeat,
        fleet=FleetOptions(attempts=part.max_attempts, patience=patience, **options),
    )
    return route(model, max_model_len, joining, tell)


def collectors(llm: "LLM") -> Sequence[Any]:
    """What shows more of a fleet at /metrics."""
    from jaxserve.fleet.fleet import Fleet
    from jaxserve.fleet.metrics import FleetCollector

    return [FleetCollector(llm.engine)] if isinstance(llm.engine, Fleet) else []


def run_instance(
    part: Part, load: Callable[["Peers", bool], "LLM"], host: str, max_model_len: int | None, drain_timeout: float,
    tell: Callable[[str], None],
) -> NoReturn:  # fmt: skip
    """Serves as an instance; ends with 0 when it has left, with 1 if its engine has failed."""
    from jaxserve.fleet.worker import WorkerOptions, work

    at, _, port = str(part.router).rpartition(":")
    options = WorkerOptions(
        role=part.instance or "decode",
        name=part.name or f"{part.role}-{socket.gethostname()}-{os.getpid()}",
        router=(at, int(port)),
        token=str(part.token).encode(),
        max_model_len=max_model_len,
        host=host,
        drain_timeout=drain_timeout,
    )
    status = 0
    try:
        work(load, options, tell)
        notes.print("stopped")
    except EngineError as error:
        notes.print(f"stopped: {error}", soft_wrap=True)
        status = 1
    sys.stderr.flush()
    os._exit(status)  # an engine that hangs can't be waited for
