"""The Python API: load a model, continue prompts."""

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from numbers import Integral
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.checkpoints import hf, store
from jaxserve.checkpoints.hub import locate
from jaxserve.compilation import enable_cache
from jaxserve.engine import Engine, EngineConfig
from jaxserve.layers.config import Config
from jaxserve.parallel.errors import CheckpointError, ConfigError, JaxserveError, RequestError
from jaxserve.request import CompletionOutput, Output, Request, RequestOutput, SamplingParams
from jaxserve.tokenizer import Tokenizer

__all__ = ["LLM"]

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or vLLM's `{"prompt": text}` and `{"prompt_token_ids": ids}`."""
Message = Mapping[str, Any]


class LLM:
    """A model that is loaded and ready.

        llm = LLM()                                        # the embedded model
        llm = LLM("path/to/model", dtype="bfloat16")       # a Hugging Face folder, or a name on the hub
        for output in llm.generate(["def f(x):"], SamplingParams(temperature=0, max_tokens=32)):
            print(output.outputs[0].text)

    `dtype` is that of weights, activations and cache: "float32", "bfloat16", "float16", or "auto": the checkpoint's
    own, but float32 on CPU, which has no fast 16-bit products.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 8,
        seed: int = 0,
        progress: hf.Progress | None = None,
    ):
        """Loads a model; `progress` is told the bytes in place and in all.

        Raises CheckpointError, ConfigError or RequestError that name what is wrong.
        """
        enable_cache()
        folder = locate(model)
        self.tokenizer = Tokenizer.from_folder(folder)
        raw = hf.read_json(folder)
        _check_vocabulary(self.tokenizer, Config.from_hf(raw), folder)
        cfg, weights = load(folder, resolve_dtype(dtype, raw), progress)
        options = EngineConfig(max_num_seqs=max_num_seqs, max_model_len=max_model_len, seed=seed)
        self.engine = Engine(weights, cfg, self.tokenizer, options)
        self._ids = itertools.count()
        self._inboxes: dict[str, deque[Output]] = {}
        self._lock = threading.Lock()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continues one prompt or many, as text or token ids; the results are in the order of the prompts.

        `sampling_params` are for all prompts, or one for each. Raises RequestError, and generates nothing, if any can't
        be served.
        """
        requests = self._requests(prompts, sampling_params)
        results = {r.id: _empty_result(r) for r in requests}
        for output in self._run(requests):
            _extend(results[output.request_id], output)
        return list(results.values())

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Output]:
        """Like `generate`, but yields what each step adds to an answer, as it comes."""
        return self._run(self._requests(prompts, sampling_params))

    def chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, **template: Any
    ) -> list[RequestOutput]:
        """Answers a conversation, rendered by the model's own chat template; `template` is passed on to it."""
        return self.generate([self.tokenizer.apply_chat_template(messages, **template)], sampling_params)

    def _requests(self, prompts: Any, params: Any) -> list[Request]:
        several = list(prompts) if isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes) else [prompts]
        if several and all(_is_token(t) for t in several):
            several = [several]
        each = [params or SamplingParams()] * len(several) if not isinstance(params, Sequence) else params
        wrong = next((p for p in each if not isinstance(p, SamplingParams)), None)
        if wrong is not None:
            raise RequestError(f"sampling_params must be SamplingParams, or one for each prompt; got {wrong!r}")
        if len(each) != len(several):
            raise RequestError(
                f"{len(several)} prompts and {len(each)} SamplingParams; give one for all, or one for each"
            )
        return [self._request(prompt, p) for prompt, p in zip(several, each, strict=True)]

    def _request(self, prompt: Any, params: SamplingParams) -> Request:
        if isinstance(prompt, Mapping) and len(prompt) == 1:
            prompt = prompt.get("prompt", prompt.get("prompt_token_ids"))
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif (
            hasattr(prompt, "__iter__")
            and not isinstance(prompt, bytes | Mapping | Set)
            and all(map(_is_token, prompt))
        ):
            ids = prompt
        else:
            raise RequestError(
                f"a prompt must be text, token ids, {{'prompt': text}} or {{'prompt_token_ids': ids}}; got {prompt!r}"
            )
        text = prompt if isinstance(prompt, str) else None
        request = Request(str(next(self._ids)), tuple(map(int, ids)), params, text)
        self.engine.check(request)
        return request

    def _run(self, requests: list[Request]) -> Iterator[Output]:
        """Steps until all are answered; those that are not, because the caller went away, are aborted."""
        inbox: deque[Output] = deque()
        running = {request.id for request in requests}
        try:
            with self._lock:
                for request in requests:
                    self._inboxes[request.id] = inbox
                    self.engine.add(request)
            while running:
                output = self._next(inbox)
                if output.finish_reason:
                    running.discard(output.request_id)
                if output.finish_reason == "error":
                    raise JaxserveError(f"request {output.request_id}: {output.stop_reason}")
                yield output
        finally:
            with self._lock:
                for request in requests:
                    self._inboxes.pop(request.id, None)
                    self.engine.abort(request.id)

    def _next(self, inbox: deque[Output]) -> Output:
        """The next output for one caller. Whoever waits makes a step for all: callers may be threads or take turns."""
        with self._lock:
            while not inbox:
                for output in self.engine.step():
                    self._inboxes[output.request_id].append(output)
            return inbox.popleft()


def _is_token(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def load(folder: Path, dtype: Any, progress: hf.Progress | None = None) -> tuple[Config, Any]:
    """The weights of a folder that `checkpoints.store` saved, or of a Hugging Face checkpoint."""
    if store.is_store(folder):
        return store.restore(folder, dtype)
    return hf.load(folder, dtype, progress=progress)


def _check_vocabulary(tokenizer: Tokenizer, cfg: Config, folder: Path) -> None:
    if tokenizer.vocab_size > cfg.vocab_size:
        raise CheckpointError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, config.json has a vocab_size of "
            f"{cfg.vocab_size}; "
            "they are not of the same model, fetch both again"
        )


def resolve_dtype(dtype: str, raw: Mapping[str, Any]) -> Any:
    """The dtype by its name, or what "auto" stands for on this machine."""
    if dtype == "auto":
        cpu = jax.default_backend() == "cpu"
        dtype = "float32" if cpu else raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype {dtype!r} is not supported; supported: auto, float32, bfloat16, float16")
    return jnp.dtype(dtype)


def _empty_result(request: Request) -> RequestOutput:
    logprobs = None if request.params.logprobs is None else []
    answer = CompletionOutput(index=0, logprobs=logprobs)
    return RequestOutput(request.id, request.prompt, list(request.prompt_token_ids), [answer])


def _extend(result: RequestOutput, output: Output) -> None:
    answer = result.outputs[0]
    answer.text += output.text
    answer.token_ids += output.token_ids
    if answer.logprobs is not None:
        answer.logprobs += output.logprobs
    answer.finish_reason, answer.stop_reason = output.finish_reason, output.stop_reason
