"""`jaxserve plan`: what a mesh would hold and send."""

import json
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jaxserve.cli.options import KvCacheDtypeOption, ModelArgument, QuantizationOption
from jaxserve.cli.show import print_table

if TYPE_CHECKING:
    from jaxserve.account import Account
    from jaxserve.parallel.mesh import Topology


def plan(
    model: ModelArgument = None,
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

    \b
    jaxserve plan deepseek-ai/DeepSeek-V3 --mesh 20x16 \\
        --machine cloudmatrix384-dies --max-num-seqs 96 \\
        --num-shared-expert-ranks 32 --num-redundant-experts 32

    \b
    jaxserve plan deepseek-ai/DeepSeek-V3 --mesh 2x16 --phase prefill \\
        --max-num-batched-tokens 16384
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
    print_table(f"memory of a rank, in {dtype}", accounts.memory_rows(found, machine), "right")
    print_table("buffers of a layer", accounts.buffer_rows(found), "right", ("", "dispatch", "combine"))
    print_table("collectives of the traced program", accounts.traffic_rows(found, machine), "right", head)
    print_table("all of a step", accounts.step_rows(found, machine), "right")
