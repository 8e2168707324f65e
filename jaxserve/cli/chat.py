"""`jaxserve chat`: a conversation in the terminal."""

import secrets
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.cli.devices import emulate
from jaxserve.cli.generate import load_model
from jaxserve.cli.options import (
    ApiKeyOption,
    DevicesOption,
    DtypeOption,
    KvCacheDtypeOption,
    MaxModelLenOption,
    MaxTokensOption,
    MeshOption,
    MinPOption,
    ModelOption,
    QuantizationOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    UrlOption,
)
from jaxserve.cli.show import notes, progress
from jaxserve.conversation import Conversation, Piece, Speak, read_messages, typed
from jaxserve.parallel.errors import JaxserveError, RequestError
from jaxserve.request import SamplingParams

if TYPE_CHECKING:
    from jaxserve.client import Client


def chat(
    model: ModelOption = None,
    url: UrlOption = None,
    api_key: ApiKeyOption = None,
    system: Annotated[str | None, typer.Option(help="How to answer, as the system's message.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on with messages that /save wrote.")] = None,
    max_tokens: MaxTokensOption = 1024,
    temperature: TemperatureOption = 0.6,
    top_p: TopPOption = 0.9,
    top_k: TopKOption = 0,
    min_p: MinPOption = 0.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    max_model_len: MaxModelLenOption = None,
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    devices: DevicesOption = None,
    mesh: MeshOption = None,
) -> None:
    """Talks with a model, in this process or behind a server.

    A line is a message; one that ends with a backslash goes on in the next. Ctrl-C stops an answer, Ctrl-D ends. Lines
    that begin with a slash are commands: /help lists them. From a pipe, messages are read a line each, and nothing but
    answers is printed.

    jaxserve chat --model Qwen/Qwen3-0.6B

    jaxserve chat --url http://127.0.0.1:8000 --system "Answer in one sentence."

    echo "What is JAX?" | jaxserve chat -m Qwen/Qwen3-0.6B --temperature 0
    """
    conversation = Conversation(read_messages(load) if load else ())
    if system:
        conversation.command(f"/system {system}")
    seed = secrets.randbelow(2**32) if seed is None else seed
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, stop=stop
    )
    here = {
        "max_model_len": max_model_len,
        "dtype": dtype,
        "quantization": quantization,
        "kv_cache_dtype": kv_cache_dtype,
        "devices": devices,
        "mesh": mesh,
    }
    if url is None:
        who = _who(model)
        _talk(conversation, _model(model, params, here), who)
        return
    if given := [name for name, value in here.items() if value not in (None, "auto")]:
        option = given[0].replace("_", "-")
        raise RequestError(f"--{option} is for a model in this process; leave it out, or --url")
    from jaxserve import speakers
    from jaxserve.client import Client

    with Client(url, api_key) as client:
        name = model or _found(client)
        _talk(conversation, speakers.of_server(client, name, params), f"{name} at {client.url}")


def _model(model: str | None, params: SamplingParams, options: dict[str, Any]) -> Speak:
    """A model in this process."""
    from jaxserve import speakers

    with progress() as shown:
        mesh = emulate(options.pop("devices"), options.pop("mesh"))
        return speakers.of_model(load_model(model, shown, mesh=mesh, **options), params)


def _who(model: str | None) -> str:
    """Who answers, and whether it was trained to; RequestError if it can't."""
    from jaxserve.checkpoints.hub import locate
    from jaxserve.tokenizer import Tokenizer

    name, template = model or "embedded", Tokenizer.from_folder(locate(model)).chat_templates.get("default")
    if template is None:
        raise RequestError(f"{name} {_NO_TEMPLATE}")
    return name if "role" in template else f"{name}, which goes on with texts and was not trained to chat"


def _found(client: "Client") -> str:
    """The name of the server's model; RequestError if it can't chat."""
    about = client.model()
    if about.get("chat") is False:  # of a server that is not ours nothing is known
        raise RequestError(f"{about['id']} at {client.url} {_NO_TEMPLATE}")
    return about["id"]


_NO_TEMPLATE = "has no chat template, so it can't chat; `jaxserve generate` has it continue a text"


def _talk(conversation: Conversation, speak: Speak, who: str) -> None:
    """Reads and answers, to the end of what is typed or piped in."""
    if sys.stdin is None:
        raise RequestError("standard input is closed; pipe messages into it, a line each")
    people = sys.stdin.isatty() and sys.stdout.isatty()
    if people:
        _edit_lines()
        notes.print(f"{who}; /help lists commands, Ctrl-D ends", style="dim", soft_wrap=True)
    for line in typed(people):
        try:
            if line.strip() == "/exit":
                return
            if line.startswith("/"):
                notes.print(conversation.command(line.strip()), style="dim", soft_wrap=True)
            else:
                _answer(conversation, line, speak, people)
        except JaxserveError as error:
            if not people:
                raise
            notes.print(f"error: {error}", style="red", soft_wrap=True)


def _edit_lines() -> None:
    """Arrows, history and the like in `input`, where the platform has them."""
    try:
        import readline  # noqa: F401  # to import it is enough
    except ImportError:
        pass


def _answer(conversation: Conversation, line: str, speak: Speak, people: bool) -> None:
    """Prints an answer as it comes, until it ends or Ctrl-C does."""
    cut = False
    with closing(conversation.ask(line, speak)) as pieces:
        try:
            cut = _show(pieces, people)
        except KeyboardInterrupt:
            if not people:
                raise
        finally:
            print(flush=True)
    if cut:
        notes.print("(cut for want of tokens; raise --max-tokens or --max-model-len)", style="dim", soft_wrap=True)


def _show(pieces: Iterable[Piece], people: bool) -> bool:
    """Prints pieces, for people the thoughts too; whether the answer was cut."""
    cut = thinking = False
    for piece in pieces:
        if people and piece.thoughts:
            notes.print(piece.thoughts, style="dim", end="", soft_wrap=True)
            thinking = True
        if thinking and piece.text:
            print("\n")
            thinking = False
        print(piece.text, end="", flush=True)
        cut = piece.cut
    return cut
