"""The Python API: load a model, continue prompts."""

import difflib
import itertools
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext, suppress
from dataclasses import fields, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxserve import options as sizes
from jaxserve.checkpoints import hf
from jaxserve.checkpoints.formats import find_format
from jaxserve.checkpoints.hub import locate
from jaxserve.compilation import enable_cache, executables_folder
from jaxserve.connector import Connector
from jaxserve.context import make_connector
from jaxserve.engine import Engine
from jaxserve.executables import Executables
from jaxserve.footprint import check_room
from jaxserve.layers.config import Config
from jaxserve.layers.int8 import in_int8
from jaxserve.layers.spread import in_order, spread
from jaxserve.layers.transformer import Model, model_params
from jaxserve.models import find_cache, open_checkpoint, open_weights, resolve_dtype
from jaxserve.options import EngineConfig
from jaxserve.parallel.errors import CheckpointError, RequestError, ShardingError
from jaxserve.parallel.mesh import find_shape, make_mesh
from jaxserve.peers import Peers
from jaxserve.progress import Progress, bar
from jaxserve.request import CompletionOutput, Output, Request, RequestOutput, SamplingParams
from jaxserve.serving import Serving
from jaxserve.tiers.store import StoreConfig
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
    own, but float32 on CPU, which has no fast 16-bit products. `quantization="int8"` rounds the matrices of attention,
    networks and experts to INT8, half the memory of 16 bits, and multiplies in integers.

    `mesh` is "2x4" (nodes x devices of a node), the name of a `parallel.mesh.Topology`, or a mesh with the same axes:
    each device then has answers of its own, and some of the experts. `options` are those of `EngineConfig`.

    `context_cache` keeps what was computed of prompts beyond the cache on the device: True, in memory and in the user's
    cache folder; or as a `StoreConfig` says, in a server too that many instances share.

    `model_cache` is a folder where weights are kept as the engine takes them, from where the next instance maps them.
    Without it they are looked for where `jaxserve models prefetch` puts them; "off": nowhere.

    Programs are compiled before the first request and kept on disk for the next time, unless JAX's own options for that
    say otherwise; a bar shows how far it is, or `progress` is told.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        mesh: Mesh | str | None = None,
        context_cache: StoreConfig | bool | None = None,
        model_cache: str | Path | None = None,
        progress: Progress | None = None,
        peers: Peers | None = None,
        exports: bool = False,
        **options: Any,
    ):
        """Loads a model and compiles what it needs to run; its engine takes pages from `peers`, or `exports` them too.

        Raises CheckpointError, ConfigError, RequestError, ShardingError or ProcessError that name what is wrong,
        TypeError for an unknown option.
        """
        engine_config = _engine_config(options)
        if quantization not in (None, "int8"):
            raise RequestError(f"quantization = {quantization!r}: it must be None or 'int8'")
        devices = make_mesh(*find_shape(mesh)) if isinstance(mesh, str) else mesh
        if not isinstance(devices, Mesh | None):
            raise ShardingError(f"mesh = {mesh!r}: it must be text like '2x4', the name of a machine, or a jax Mesh")
        for name in ("num_redundant_experts", "num_shared_expert_ranks", "expert_exchange", "num_microbatches"):
            value = getattr(engine_config, name)
            if devices is None and value != getattr(EngineConfig(), name):
                raise RequestError(f"{name} = {value!r}: it is for a mesh; give mesh too")
        folder, cache = locate(model), find_cache(model_cache)
        self.tokenizer = Tokenizer.from_folder(folder)
        raw = hf.read_json(folder)
        announced = Config.from_hf(raw)
        check_vocabulary(self.tokenizer, announced, folder)
        resolved, int8 = resolve_dtype(dtype, raw), quantization is not None
        sizes.check(announced, engine_config, resolved)  # before what takes long
        found = open_weights(model, folder, resolved, int8, cache)
        cfg = found.cfg
        check_room(cfg, engine_config, resolved, devices, found.params)
        if obstacle := enable_cache():
            warnings.warn(f"compiled programs can't be kept for the next time: {obstacle}", stacklevel=2)
        with nullcontext(progress) if progress else bar() as tell:
            weights = found.read(partial(tell, "loading"))
            connector = _connect(weights, cfg, engine_config, context_cache, peers, exports)
            if devices:
                extra = engine_config.num_redundant_experts, engine_config.num_shared_expert_ranks
                weights = spread(weights, cfg, devices, in_order(cfg, devices.size, *extra))
            compiling, kept = partial(tell, "compiling"), Executables(executables_folder())
            engine = Engine(weights, cfg, self.tokenizer, engine_config, compiling, devices, kept, connector)
        self._begin(engine, connector.close if connector else _nothing)

    @classmethod
    def over(cls, engine: Serving, tokenizer: Tokenizer, close: Callable[[], object] | None = None) -> "LLM":
        """A model that something else serves than an engine of this process, a `fleet.Fleet` for example.

        `close` ends what that has opened.
        """
        llm = cls.__new__(cls)
        llm.tokenizer = tokenizer
        llm._begin(engine, close or _nothing)
        return llm

    def _begin(self, engine: Serving, close: Callable[[], object]) -> None:
        self.engine, self._close = engine, close
        self._calls = itertools.count()
        self._inboxes: dict[str, deque[Output]] = {}
        self._left: deque[str] = deque()  # requests whose callers went away
        self._lock = threading.Lock()

    def close(self) -> None:
        """Writes what the context cache still has to, ends threads and connections; nothing can be generated then."""
        self._close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Continues one prompt or many, as text or token ids; the results are in the order of the prompts.

        `sampling_params` are for all prompts, or one for each; `priority` too: the lower comes first. Raises
        RequestError, and generates nothing, if any can't be served. What fails later has the finish_reason "error", and
        leaves the other answers as they are.

        Of processes that share a mesh each must call it, with no prompts if it has none: all make the same steps, and
        all return when the last has its answers.
        """
        requests = self._requests(prompts, sampling_params, priority)
        results = [_empty_result(str(i), request) for i, request in enumerate(requests)]
        for output in self._run(requests):
            _extend(results[int(output.request_id)], output)
        return results

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> Iterator[Output]:
        """Like `generate`, but yields what each step adds to an answer, as it comes.

        An output's `request_id` is the number of its prompt, from "0" on, its `index` that of the answer to it. Of
        processes that share a mesh, those that take their outputs late keep the others waiting.
        """
        return self._run(self._requests(prompts, sampling_params, priority))

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation, rendered by the model's own chat template.

        `chat_template_kwargs` are variables that this template knows, `enable_thinking` of Qwen3's for example.
        """
        prompt = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.generate([prompt], sampling_params)

    def _requests(self, prompts: Any, params: Any, priority: Any) -> list[Request]:
        several = list(prompts) if isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes) else [prompts]
        if several and all(_is_token(t) for t in several):
            several = [several]
        params = SamplingParams() if params is None else params
        each = _one_each("sampling_params", SamplingParams, params, len(several))
        priorities = _one_each("priority", int, priority, len(several))
        call = next(self._calls)
        asked = zip(several, each, priorities, strict=True)
        return [self._request(f"{call}-{i}", *one) for i, one in enumerate(asked)]

    def _request(self, id: str, prompt: Any, params: SamplingParams, priority: int) -> Request:
        if isinstance(prompt, Mapping) and set(prompt) in ({"prompt"}, {"prompt_token_ids"}):
            (prompt,) = prompt.values()
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
        request = Request(id, tuple(map(int, ids)), params, text, priority)
        self.engine.check(request)
        return request

    def _run(self, requests: list[Request]) -> Iterator[Output]:
        """Steps until all are answered; those that are not, because the caller went away, are aborted."""
        inbox: deque[Output] = deque()
        names, done = {request.id: str(i) for i, request in enumerate(requests)}, False
        open_answers = sum(request.params.n for request in requests)
        try:
            with self._lock:
                self._forget()
                for request in requests:
                    self._inboxes[request.id] = inbox
                    self.engine.add(request)
            while open_answers:
                output = self._next(inbox)
                open_answers -= output.finish_reason is not None
                yield replace(output, request_id=names[output.request_id])
            done = True
        except GeneratorExit:
            done = True  # the caller has seen enough
            raise
        finally:
            self._left.extend(request.id for request in requests)
            if self._lock.acquire(blocking=False):  # the garbage collector may end a stream in the middle of a step
                try:
                    self._forget()
                finally:
                    self._lock.release()
                if done and self.engine.many:
                    self._keep_up(begun=bool(requests))

    def _next(self, inbox: deque[Output]) -> Output:
        """The next output for one caller. Whoever waits makes a step for all: callers may be threads or take turns."""
        with self._lock:
            self._forget()
            while not inbox:
                if not self.engine.busy:
                    raise RuntimeError("the engine has nothing to do, and an answer is missing")
                self._step()
            return inbox.popleft()

    def _keep_up(self, begun: bool) -> None:
        """Makes the steps of the other processes of a mesh until they have their answers too."""
        while True:
            with self._lock:  # others may ask for more meanwhile
                if begun and not self.engine.busy:
                    return
                self._step()
            begun = True

    def _step(self) -> None:
        """A step for all; the caller holds the lock. If it fails, others are told that their answers are lost."""
        try:
            outputs = self.engine.step()
        except BaseException:
            with suppress(Exception):
                self._hand_out(self.engine.recover())
            raise
        self._hand_out(outputs)

    def _hand_out(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            self._inboxes[output.request_id].append(output)

    def _forget(self) -> None:
        """Aborts what nobody waits for any more; the caller holds the lock."""
        while self._left:
            id = self._left.popleft()
            self._inboxes.pop(id, None)
            self.engine.abort(id)


def _nothing() -> None:
    """There is nothing to close."""


def _engine_config(options: Mapping[str, Any]) -> EngineConfig:
    known = [field.name for field in fields(EngineConfig)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise TypeError(f"LLM has no option {name!r}; {hint}")
    return EngineConfig(**options)


def _connect(
    weights: Model, cfg: Config, options: EngineConfig, store: StoreConfig | bool | None, peers: Peers | None,
    exports: bool,
) -> Connector | None:  # fmt: skip
    try:
        return make_connector(weights, cfg, options, store, peers, exports)
    except OSError as error:
        if peers is None:
            raise
        raise RequestError(f"can't listen at {peers.host} for engines that take pages: {error}") from None


def _one_each(name: str, kind: type, given: Any, count: int) -> Sequence[Any]:
    """What was given for each of so many prompts, or for all."""
    each = given if isinstance(given, Sequence) else [given] * count
    wrong = next((value for value in each if not isinstance(value, kind)), None)
    if wrong is not None:
        raise RequestError(f"{name} must be {kind.__name__}, or one for each prompt; got {wrong!r}")
    if len(each) != count:
        raise RequestError(f"{count} prompts and {len(each)} {name}; give one for all, or one for each")
    return each


def _is_token(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def describe_weights(folder: Path, raw: Mapping[str, Any], cfg: Config, dtype: Any) -> Model:
    """The tree of `Param` of a folder's weights: by the files' headers, without them by what is announced."""
    try:
        return open_checkpoint(folder).params(dtype)
    except CheckpointError:  # they are not there, or not all
        params = model_params(cfg, dtype)
        return in_int8(params) if find_format(raw, folder).codes == "I8" else params


def check_vocabulary(tokenizer: Tokenizer, cfg: Config, folder: Path) -> None:
    """Raises CheckpointError if the model has no embedding for some of the tokens."""
    if tokenizer.vocab_size > cfg.vocab_size:
        raise CheckpointError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, config.json has a vocab_size of "
            f"{cfg.vocab_size}; "
            "they are not of the same model, fetch both again"
        )


def _empty_result(id: str, request: Request) -> RequestOutput:
    wanted = request.params.logprobs is not None
    answers = [CompletionOutput(index, logprobs=[] if wanted else None) for index in range(request.params.n)]
    return RequestOutput(id, request.prompt, list(request.prompt_token_ids), answers)


def _extend(result: RequestOutput, output: Output) -> None:
    answer = result.outputs[output.index]
    answer.text += output.text
    answer.token_ids += output.token_ids
    if answer.logprobs is not None:
        answer.logprobs += output.logprobs
    answer.finish_reason, answer.stop_reason = output.finish_reason, output.stop_reason
    answer.error = output.error
    if output.prompt_logprobs is not None:
        result.prompt_logprobs = list(output.prompt_logprobs)
    if output.index == 0:
        result.num_cached_tokens = max(result.num_cached_tokens, output.num_cached_tokens)
