"""The command line. Heavy imports wait until a command needs them, so that help is instant."""

import io
import json
import math
import os
import re
import secrets
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import jaxserve
from jaxserve.parallel.errors import JaxserveError, RequestError
from jaxserve.request import SamplingParams

if TYPE_CHECKING:
    from jaxserve.account import Account
    from jaxserve.checkpoints.evaluation.suite import Evaluation
    from jaxserve.llm import LLM
    from jaxserve.parallel.mesh import Topology

app = typer.Typer(
    help="Serve mixture-of-experts language models with JAX.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Rich's help cuts the names of options where the terminal is narrow
    context_settings={"help_option_names": ["-h", "--help"]},
)
notes = Console(stderr=True, markup=False, emoji=False, highlight=False)

PromptArgument = Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Folder of a Hugging Face model, or its name on the hub (without it, the embedded one)."
    ),
]
MaxTokensOption = Annotated[int, typer.Option(help="Tokens to generate at most.")]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the most probable token; higher is more varied.")]
TopPOption = Annotated[float, typer.Option(help="Draw from the most probable tokens that reach this mass.")]
TopKOption = Annotated[int, typer.Option(help="Draw from this many most probable tokens; 0: all.")]
MinPOption = Annotated[float, typer.Option(help="Draw from tokens this probable, relative to the most probable.")]
SeedOption = Annotated[int | None, typer.Option(help="Repeats what was drawn; without it, another each time.")]
StopOption = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be given several times.")]
MaxModelLenOption = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer together at most; the cache has room for them.")
]
DtypeOption = Annotated[
    str, typer.Option(help="float32, bfloat16, float16; auto: the checkpoint's own, on CPU float32.")
]
QuantizationOption = Annotated[
    Literal["int8"] | None,
    typer.Option(help="int8: the matrices of attention, networks and experts, and products, in INT8."),
]
KvCacheDtypeOption = Annotated[
    Literal["auto", "int8"],
    typer.Option(help="Of the cache; int8: latents in INT8, keys in 16 bits; auto: that of activations."),
]
DevicesOption = Annotated[
    int | None,
    typer.Option(min=1, help="On CPU, emulate so many devices in this process; without it, those that --mesh needs."),
]
MeshOption = Annotated[
    str | None,
    typer.Option(help="Run on several devices: nodes x devices of each, like 2x4; experts are spread over them."),
]
CoordinatorOption = Annotated[
    str | None,
    typer.Option(help="Share the mesh with other processes, which meet at this host:port; it is on the first's host."),
]
NumProcessesOption = Annotated[int, typer.Option(min=1, help="How many processes share the mesh.")]
ProcessIdOption = Annotated[int, typer.Option(min=0, help="Which of them this is, from 0.")]
VersionOption = Annotated[bool, typer.Option("--version", help="Show the version and exit.")]


def main() -> NoReturn:
    """Runs a command and exits: with 130 after Ctrl-C, with 1 if its output can't be written.

    What is wrong with its input is told in one line, with status 2.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    sys.unraisablehook = _end_if_interrupted
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that knows ASCII alone, say
    try:
        sys.exit(app(standalone_mode=False))
    except typer.TyperException as error:
        _fail(f"{error.format_message().rstrip('.')}; --help lists what there is", 2)
    except JaxserveError as error:
        _fail(str(error), 2)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries again to write what is left, and complains
        _fail(str(error), 1)


def _end_if_interrupted(unraisable: Any) -> None:
    """Ctrl-C that falls into one of JAX's callbacks, which can't pass it on, ends the program all the same."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        return sys.__unraisablehook__(unraisable)
    notes.show_cursor()
    os._exit(130)


def _fail(message: str, status: int) -> NoReturn:
    notes.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    sys.exit(status)


@app.callback(invoke_without_command=True)
def _jaxserve(context: typer.Context, version: VersionOption = False) -> None:
    if version:
        typer.echo(f"jaxserve {jaxserve.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@app.command()
def generate(
    prompt: PromptArgument,
    model: ModelOption = None,
    max_tokens: MaxTokensOption = 128,
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
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = 1,
    process_id: ProcessIdOption = 0,
) -> None:
    """Continues a prompt and streams the text.

    jaxserve generate "def quicksort(items):"

    jaxserve generate -m Qwen/Qwen3-0.6B --temperature 0.7 --top-p 0.9 "The supernode"

    jaxserve generate --mesh 2x4 "def quicksort(items):"

    jaxserve generate --mesh 2x4 --coordinator localhost:7000 --num-processes 2 --process-id 0 "def quicksort(items):"
    """
    seed, stop = secrets.randbelow(2**32) if seed is None else seed, stop or []
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, stop=stop
    )
    text = _text(prompt)
    with _progress() as progress:
        if coordinator or num_processes > 1 or process_id:
            _join(coordinator, num_processes, process_id, devices, mesh)
        else:
            mesh = _emulate(devices, mesh)
        llm = _load(
            model,
            progress,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=max_model_len,
            mesh=mesh,
        )
    _stream(text, llm, params)


def _text(prompt: str) -> str:
    """The prompt, or for - all of standard input."""
    if prompt != "-":
        return prompt
    if sys.stdin is None:
        raise RequestError("standard input is closed; pipe the prompt into it, or give it in place of -")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise RequestError(f"standard input is not UTF-8 ({byte}); convert it, with iconv for example") from None


def _progress() -> Any:
    from jaxserve.progress import bar

    return bar()


def _load(model: str | None, progress: Any, **options: Any) -> "LLM":
    """Loads a model for one prompt at a time."""
    from jaxserve.llm import LLM

    # One prompt needs few of the programs that many would.
    return LLM(model, progress=progress, max_num_seqs=1, warmup=False, **options)


def _join(coordinator: str | None, processes: int, process: int, devices: int | None, mesh: str | None) -> None:
    """Meets the other processes; on CPU each emulates its part of the mesh."""
    import jax

    from jaxserve.parallel.mesh import find_shape

    missing = [name for name, value in {"--mesh": mesh, "--coordinator": coordinator}.items() if value is None]
    if mesh is None or coordinator is None:
        raise RequestError(f"{' and '.join(missing)} missing: processes share a mesh, and meet at a coordinator")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise RequestError(f"--coordinator {coordinator}: it must be host:port, like localhost:7000")
    if process >= processes:
        raise RequestError(f"--process-id {process}: it must be less than --num-processes, {processes}")
    size = math.prod(find_shape(mesh))
    if devices is None and size % processes:
        raise RequestError(f"--mesh {mesh} has {size} devices, which {processes} processes can't share evenly")
    jax.config.update("jax_num_cpu_devices", devices or size // processes)
    jax.distributed.initialize(coordinator, processes, process)


def _emulate(devices: int | None, mesh: str | None) -> str | None:
    """Has JAX show as many CPU devices as are asked for, and gives the mesh: of devices alone, one node."""
    import jax

    from jaxserve.parallel.mesh import find_shape

    mesh = f"1x{devices}" if devices and not mesh else mesh
    if mesh:
        jax.config.update("jax_num_cpu_devices", devices or math.prod(find_shape(mesh)))  # before a backend starts
    return mesh


def _stream(prompt: str, llm: "LLM", params: SamplingParams) -> None:
    """Prints the prompt and what follows it as it comes, then how fast it was."""
    from jaxserve.stopwatch import Stopwatch

    outputs = llm.stream(prompt, params)  # refuses what can't be served before anything is shown
    watch, reason = Stopwatch(), None
    try:
        print(prompt, end="", flush=True)
        for output in outputs:
            watch.count(len(output.token_ids))
            reason = output.finish_reason
            print(output.text, end="", flush=True)
    finally:
        print(flush=True)  # also after Ctrl-C
    if reason == "length" and watch.tokens < (params.max_tokens or 0):
        cut = f"cut after {watch.tokens} of {params.max_tokens} tokens, for want of room; raise --max-model-len"
        notes.print(f"\nwarning: {cut}", soft_wrap=True)
    notes.print(f"\n{watch.summary(llm.engine.memory)} | seed {params.seed}", style="dim", soft_wrap=True)


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="Folder or hub name; without it, the embedded model.")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights and cache, for the memory they take.")] = "bfloat16",
    kv_cache_dtype: KvCacheDtypeOption = "auto",
) -> None:
    """Shows a model's architecture, parameters and memory.

    Parameters by part, and the memory of weights and cache. Reads no weights, they need not be there: config.json, and
    of files that are there the headers, which say what is INT8.
    """
    from jaxserve.checkpoints.formats import DESCRIPTION
    from jaxserve.checkpoints.hf import read_json
    from jaxserve.checkpoints.hub import locate
    from jaxserve.describe import architecture, memory, parts
    from jaxserve.layers.config import Config
    from jaxserve.llm import describe_weights, resolve_dtype

    folder = locate(model, wanted=("config.json", DESCRIPTION))
    raw = read_json(folder)
    cfg, kind = Config.from_hf(raw), resolve_dtype(dtype, raw)
    weights = describe_weights(folder, raw, cfg, kind)  # refuses what can't be read before anything is shown
    _print_table(f"{cfg.model_type}  {folder}", architecture(cfg), "left")
    _print_table("parameters", parts(cfg), "right")
    _print_table(f"memory in {kind}", memory(cfg, kind, weights, kv_cache_dtype=kv_cache_dtype), "right")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub name; embedded is the embedded model.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the INT8 model.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A file to calibrate with, several if repeated; without it, Python's own library."),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="How many pieces of text.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 256,
    without: Annotated[
        list[str] | None, typer.Option(help="A part to leave out: outliers, scales, clipping, compensation, mixed.")
    ] = None,
    form: Annotated[
        Literal["compressed-tensors", "orbax"],
        typer.Option("--format", help="What other engines read too, or what restores onto any mesh by itself."),
    ] = "compressed-tensors",
) -> None:
    """Writes a model with INT8 weights, chosen with text that passes through it.

    Takes one layer at a time, so memory is needed for one. Stopped, the same command goes on where it was. For each
    block of a layer it shows the share of its output's squares that INT8 loses: rounded plainly, then after each part.

    outliers: scales and rotations, folded into the weights, even out what enters a matrix. scales: the best ones are
    searched. clipping: of the largest weights. compensation: rounding that makes up for what was lost, and a bias.
    mixed: what would lose too much stays in float.

    jaxserve quantize embedded model-int8

    jaxserve quantize Qwen/Qwen3-0.6B qwen3-int8 --text my-prompts.txt --without compensation
    """
    from jaxserve import quantization

    with _progress() as progress:
        reports = quantization.quantize(model, out, text or [], (sequences, length), without or [], form, progress)
    names = quantization.head(quantization.columns(reports))
    _print_table(
        f"{out}: lost of each block's output, in millionths of its squares", quantization.rows(reports), "right", names
    )
    for line in quantization.starved(reports):
        notes.print(line, soft_wrap=True)


@app.command()
def plan(
    model: Annotated[str | None, typer.Argument(help="Folder or hub name; without it, the embedded model.")] = None,
    mesh: Annotated[
        str, typer.Option(help="Nodes x devices of each, like 20x16, or the name of a machine; it need not be there.")
    ] = "2x4",
    phase: Annotated[
        Literal["decode", "prefill"], typer.Option(help="What the ranks do; weights lie as suits that best.")
    ] = "decode",
    max_num_seqs: Annotated[int, typer.Option(help="Answers that each rank generates together.")] = 8,
    max_model_len: Annotated[
        int, typer.Option(help="Tokens of a prompt and its answer; the cache holds as many.")
    ] = 4096,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Prompt tokens of a step, of all ranks together.")] = 512,
    num_speculative_tokens: Annotated[int, typer.Option(help="Guesses a step, by the MTP module.")] = 0,
    num_redundant_experts: Annotated[int, typer.Option(help="Slots for replicas of experts.")] = 0,
    num_shared_expert_ranks: Annotated[
        int, typer.Option(help="Ranks that hold copies of the shared expert alone.")
    ] = 0,
    expert_exchange: Annotated[
        Literal["flat", "hierarchical"], typer.Option(help="Among all ranks at once, or within nodes first.")
    ] = "flat",
    quantization: QuantizationOption = None,
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    past: Annotated[bool, typer.Option("--past", help="Prefill of chunks whose prompts have begun before.")] = False,
    page_size: Annotated[int, typer.Option(help="Tokens of a page of the cache.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of weights, activations and cache.")] = "bfloat16",
    machine: Annotated[
        str | None, typer.Option(help="Whose memory and links to compare with: cloudmatrix384-dies, h100x8, …")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes and seconds, for programs.")] = False,
) -> None:
    """Shows what each rank of a mesh would hold and send, before there is a mesh.

    Traces the engine's own program for arrays that are described and never made: any model takes seconds, and no
    memory. Reads config.json alone. Times are estimates, from the bandwidth that was measured of a machine.

    jaxserve plan --mesh 2x4

    jaxserve plan deepseek-ai/DeepSeek-V3 --mesh 20x16 --machine cloudmatrix384-dies --max-num-seqs 96
    --num-shared-expert-ranks 32 --num-redundant-experts 32

    jaxserve plan deepseek-ai/DeepSeek-V3 --mesh 2x16 --phase prefill --max-num-batched-tokens 16384
    """
    from jaxserve import account as accounts
    from jaxserve.checkpoints.hf import read_json
    from jaxserve.checkpoints.hub import locate
    from jaxserve.layers.config import Config
    from jaxserve.llm import resolve_dtype
    from jaxserve.options import EngineConfig
    from jaxserve.parallel.mesh import PRESETS, abstract_mesh, find_shape

    shape = find_shape(mesh)
    machine = mesh if machine is None and mesh in PRESETS else machine
    known = accounts.fit_machine(machine, shape) if machine else None
    raw = read_json(locate(model, wanted=("config.json",)))
    options = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        num_pages=max_num_seqs * -(-max_model_len // page_size),  # all that the answers can fill
        page_size=page_size,
        kv_cache_dtype=kv_cache_dtype,
        num_speculative_tokens=num_speculative_tokens,
        speculation_max_seqs=max_num_seqs,
        num_redundant_experts=num_redundant_experts,
        num_shared_expert_ranks=num_shared_expert_ranks,
        expert_exchange=expert_exchange,
    )
    kind = resolve_dtype(dtype, raw)
    found = accounts.account(
        Config.from_hf(raw), options, kind, abstract_mesh(*shape), phase, quantization == "int8", past
    )
    if as_json:
        typer.echo(json.dumps(accounts.as_json(found, known), indent=2))
    else:
        rounded = {"matrices": quantization, "latents": kv_cache_dtype}
        in_int8 = " and ".join(what for what, how in rounded.items() if how == "int8")
        _print_account(found, known, f"{kind}, {in_int8} in INT8" if in_int8 else str(kind))


def _print_account(found: "Account", machine: "Topology | None", dtype: str) -> None:
    from jaxserve import account as accounts

    nodes, dies = found.mesh
    ranks, head = nodes * dies, ("where", "collective", "a step", "dtype", "operand", "leaves a rank", "estimate")
    title = f"{found.model}, {found.phase} on {nodes}x{dies}: {ranks} ranks, a step has {found.tokens:,} tokens of each"
    typer.echo(f"{title}\n")
    _print_table(f"memory of a rank, in {dtype}", accounts.memory_rows(found, machine), "right")
    _print_table("buffers of a layer", accounts.buffer_rows(found), "right", ("", "dispatch", "combine"))
    _print_table("collectives of the traced program", accounts.traffic_rows(found, machine), "right", head)
    _print_table("all of a step", accounts.step_rows(found, machine), "right")


@app.command("eval")
def evaluate(
    model: Annotated[str | None, typer.Argument(help="Folder or hub name; without it, the embedded model.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Compare with this model, or with results that --out wrote.")
    ] = None,
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    against_quantization: Annotated[
        Literal["none", "int8"] | None,
        typer.Option(help="Of the model to compare with; without --against, that is the same model."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these, with commas between them: keyword,bracket.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many items of each task, for a quick look.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write scores and all items to this file, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print scores as JSON, for programs.")] = False,
) -> None:
    """Scores a model on fourteen tasks of Python code, made from modules of the standard library.

    They are the modules held out from the embedded model's training. Of two models each item is compared with itself,
    so that small differences show: A is the model, B the one to compare with.

    jaxserve eval

    jaxserve eval Qwen/Qwen3-0.6B --limit 50 --tasks keyword,name

    jaxserve eval path/to/model --quantization int8 --against path/to/model

    jaxserve eval --out float.json; jaxserve eval --quantization int8 --against float.json
    """
    from jaxserve.checkpoints.evaluation import results, suite
    from jaxserve.checkpoints.hub import locate
    from jaxserve.evaluate import evaluate

    if out and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise RequestError(f"--out {out}: it must be a file, in a folder that is there")
    some = suite.chosen_tasks(tasks.replace(" ", "").split(",") if tasks else None)
    other = None
    if against and Path(against).is_file():
        if against_quantization:
            raise RequestError(f"--against-quantization is for a model, and {against} is a file; leave it out")
        other = results.read(Path(against))
        suite.check_items(suite.fingerprints(some, limit), other)
    with _progress() as progress:
        for name in (model, against if other is None else None):
            locate(name)  # a name that is wrong is told before the first is scored
        found = evaluate(model, dtype, quantization, some, limit, progress)
        if out:
            results.save(out, found)
        if other is None and (against or against_quantization):
            int8 = "int8" if against_quantization == "int8" else None
            other = evaluate(against or model, dtype, int8, some, limit, progress)
    _print_evaluation(found, other, as_json)


def _print_evaluation(found: "Evaluation", other: "Evaluation | None", as_json: bool) -> None:
    from jaxserve import evaluate
    from jaxserve.checkpoints.evaluation import results, suite

    differences = suite.compare(found, other) if other else {}
    if as_json:
        content = results.as_json(found)
        if other:
            content["against"] = results.as_json(other)
            content["differences"] = results.differences_as_json(differences)
        typer.echo(json.dumps(content, indent=2))
        return
    if other:
        typer.echo(f"A: {evaluate.title(found)}")
        rows = evaluate.difference_rows(found, other, differences)
        _print_table(f"B: {evaluate.title(other)}", rows, "right", evaluate.DIFFERENCES)
    else:
        _print_table(evaluate.title(found), evaluate.score_rows(found), "right", evaluate.SCORES)
    typer.echo(evaluate.note(found, other) if other else evaluate.note(found))


def _print_table(
    title: str, rows: Sequence[tuple[str, ...]], justify: Literal["left", "right"], head: tuple[str, ...] = ("", "")
) -> None:
    """Names and values; what is too wide for the terminal goes on in the next line."""
    console = Console(markup=False, emoji=False, highlight=False)
    table = Table(show_header=any(head), box=None, padding=(0, 0, 0, 2), header_style="dim")
    table.add_column(head[0], overflow="fold")
    for name in head[1:]:
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(title, style="bold", soft_wrap=True)
    console.print(table, "")


if __name__ == "__main__":
    main()
