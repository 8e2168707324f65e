"""`jaxserve generate`: continue a prompt."""

import secrets
import sys
from typing import TYPE_CHECKING, Any

from jaxserve.cli.devices import emulate, join
from jaxserve.cli.options import (
    CoordinatorOption,
    DevicesOption,
    DtypeOption,
    KvCacheDtypeOption,
    MaxModelLenOption,
    MaxTokensOption,
    MeshOption,
    MinPOption,
    ModelCacheOption,
    ModelOption,
    NumProcessesOption,
    ProcessIdOption,
    PromptArgument,
    QuantizationOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from jaxserve.cli.show import notes, progress
from jaxserve.parallel.errors import RequestError
from jaxserve.request import SamplingParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM


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
    model_cache: ModelCacheOption = None,
    devices: DevicesOption = None,
    mesh: MeshOption = None,
    coordinator: CoordinatorOption = None,
    num_processes: NumProcessesOption = 1,
    process_id: ProcessIdOption = 0,
) -> None:
    """Continues a prompt and streams the text.

    jaxserve generate "def quicksort(items):"

    jaxserve generate -m Qwen/Qwen3-0.6B --temperature 0.7 "The supernode"

    jaxserve generate --mesh 2x4 "def quicksort(items):"

    \b
    jaxserve generate --mesh 2x4 --coordinator localhost:7000 \\
        --num-processes 2 --process-id 0 "def quicksort(items):"
    """
    seed, stop = secrets.randbelow(2**32) if seed is None else seed, stop or []
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, stop=stop
    )
    text = _text(prompt)
    with progress() as shown:
        if coordinator or num_processes > 1 or process_id:
            join(coordinator, num_processes, process_id, devices, mesh)
        else:
            mesh = emulate(devices, mesh)
        llm = load_model(
            model,
            shown,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            model_cache=model_cache,
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


def load_model(model: str | None, progress: Any, **options: Any) -> "LLM":
    """A model for one prompt at a time."""
    from jaxserve.llm import LLM

    # One prompt needs few of the programs that many would.
    return LLM(model, progress=progress, max_num_seqs=1, warmup=False, **options)


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
