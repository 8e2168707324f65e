"""What dashboards read: Prometheus' text, by vLLM's names."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import NamedTuple

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client import Counter as Count
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxserve.counters import Counters
from jaxserve.request import Output, Request
from jaxserve.server.load import ExpertLoad
from jaxserve.tiers.counters import TierCounters

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
RECENT = 8192
"""Latencies that are kept for percentiles."""
MINUTE = 60.0

HISTOGRAMS = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", FIRST),
    "inter_token_latency_seconds": ("Between two outputs of an answer, for each token of the later.", BETWEEN),
    "request_time_per_output_token_seconds": ("Of an answer, for each token after its first.", BETWEEN),
    "e2e_request_latency_seconds": ("From a request's arrival to its last token.", WHOLE),
    "request_queue_time_seconds": ("From a request's arrival until it is begun.", WHOLE),
    "request_prefill_time_seconds": ("From when a request is begun to its first token.", WHOLE),
    "request_decode_time_seconds": ("From a request's first token to its last.", WHOLE),
    "request_inference_time_seconds": ("From when a request is begun to its last token.", WHOLE),
    "request_prompt_tokens": ("Tokens of a prompt.", TOKENS),
    "request_generation_tokens": ("Tokens of an answer.", TOKENS),
    "iteration_tokens_total": ("New tokens of a step.", TOKENS),
}


class Answered(NamedTuple):
    """An answer so far."""

    began: float  # when it got a slot
    first: float  # when its first token came
    last: float
    tokens: int


class Asked:
    """A request on its way."""

    def __init__(self, request: Request):
        self.request, self.came = request, time.monotonic()
        self.answers: dict[int, Answered] = {}
        self.finished = 0


class Metrics:
    """What happens to requests, and what the engine counts; an `Observer` of an `AsyncEngine`."""

    def __init__(self, counters: Callable[[], Counters], model: str):
        disable_created_metrics()  # else each has a second one, of when it began
        self._labels = {"model_name": model, "engine": "0"}
        self._registry, self._asked = CollectorRegistry(), {}
        self._asked: dict[str, Asked] = {}
        self.finished = 0
        self._recent = {name: deque[tuple[float, float]](maxlen=RECENT) for name in RECENTLY}
        names = tuple(self._labels)
        self._histograms = {
            name: Histogram(f"vllm:{name}", text, names, registry=self._registry, buckets=buckets).labels(
                **self._labels
            )
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        self._success = Count(
            "vllm:request_success", "Answers that ended.", (*names, "finished_reason"), registry=self._registry
        )
        self._registry.register(EngineCollector(counters, self._labels))
        ProcessCollector(registry=self._registry)

    def watch_load(self, load: ExpertLoad) -> None:
        """From now on, shows what experts get, too."""
        self.watch(LoadCollector(load, self._labels))

    def watch(self, collector: Collector) -> None:
        """From now on, shows what somebody else collects, too."""
        self._registry.register(collector)

    def text(self) -> bytes:
        """What `/metrics` says."""
        return generate_latest(self._registry)

    def percentiles(self) -> dict[str, dict[str, float] | None]:
        """In seconds, of the last minute."""
        after = time.monotonic() - MINUTE
        recent = {name: [value for at, value in kept if at > after] for name, kept in self._recent.items()}
        return {RECENTLY[name]: _percentiles(values) for name, values in recent.items()}

    # The observer's part.

    def began(self, request: Request) -> None:
        self._asked[request.id] = Asked(request)

    def left(self, request: Request, served: bool) -> None:
        asked = self._asked.pop(request.id)
        if not served:
            return
        self._observe("request_prompt_tokens", len(request.prompt_token_ids))
        for _ in range(request.params.n - asked.finished):
            self._success.labels(**self._labels, finished_reason="abort").inc()

    def said(self, outputs: Sequence[Output]) -> None:
        now = time.monotonic()
        self._observe("iteration_tokens_total", sum(len(output.token_ids) for output in outputs))
        for output in outputs:
            if asked := self._asked.get(output.request_id):
                self._note(asked, output, now)

    def _note(self, asked: Asked, output: Output, now: float) -> None:
        before, count = asked.answers.get(output.index), len(output.token_ids)
        if before is None:
            began = asked.came + output.queue_seconds
            answer = Answered(began, now, now, count)
            self._observe("time_to_first_token_seconds", now - asked.came)
            self._observe("request_queue_time_seconds", output.queue_seconds)
            self._observe("request_prefill_time_seconds", max(0.0, now - began))
        else:
            answer = before._replace(last=now, tokens=before.tokens + count)
            for _ in range(count):
                self._observe("inter_token_latency_seconds", (now - before.last) / count)
        asked.answers[output.index] = answer
        if output.finish_reason:
            self._end(asked, answer, output.finish_reason)

    def _end(self, asked: Asked, answer: Answered, reason: str) -> None:
        asked.finished += 1
        self.finished += 1
        self._success.labels(**self._labels, finished_reason=reason).inc()
        self._observe("e2e_request_latency_seconds", answer.last - asked.came)
        self._observe("request_decode_time_seconds", answer.last - answer.first)
        self._observe("request_inference_time_seconds", max(0.0, answer.last - answer.began))
        self._observe("request_generation_tokens", answer.tokens)
        if answer.tokens > 1:
            each = (answer.last - answer.first) / (answer.tokens - 1)
            self._observe("request_time_per_output_token_seconds", each)

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)
        if name in self._recent:
            self._recent[name].append((time.monotonic(), value))


RECENTLY = {
    "time_to_first_token_seconds": "time_to_first_token",
    "inter_token_latency_seconds": "inter_token",
    "e2e_request_latency_seconds": "end_to_end",
}
"""Histograms of which the page shows percentiles, and how it calls them."""


def _percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = np.percentile(values, (50, 90, 99)).tolist()
    return dict(zip(("p50", "p90", "p99"), found, strict=True))


class EngineCollector(Collector):
    """The engine's own counters, as they are when they are asked for."""

    def __init__(self, counters: Callable[[], Counters], labels: dict[str, str]):
        self._counters, self._labels = counters, labels

    def collect(self) -> Iterator[Metric]:
        c = self._counters()
        gauges = {
            "vllm:num_requests_running": ("Answers that are being generated.", c.running),
            "vllm:num_requests_waiting": ("Answers that are queued.", c.waiting),
            "vllm:kv_cache_usage_perc": ("Pages of the cache in use; 1 is all.", c.pages_used / max(1, c.pages)),
        }
        sums = {
            "vllm:num_preemptions": ("Answers that had to wait again, for want of pages.", c.preemptions),
            "vllm:prompt_tokens": ("Tokens of prompts.", c.prompt_tokens),
            "vllm:prompt_tokens_cached": ("Tokens of prompts that earlier requests have computed.", c.cached_tokens),
            "vllm:prefix_cache_queries": ("Tokens that were looked for in the cache.", c.prompt_tokens),
            "vllm:prefix_cache_hits": ("Tokens that were found in the cache.", c.cached_tokens),
            "vllm:generation_tokens": ("Tokens that were generated.", c.generated_tokens),
            "vllm:spec_decode_num_drafts": ("Times that guesses of the MTP module were verified.", c.wide_rows),
            "vllm:spec_decode_num_draft_tokens": ("Guesses of the MTP module.", c.wide_rows * len(c.accepted)),
            "vllm:spec_decode_num_accepted_tokens": ("Guesses of the MTP module that held.", sum(c.accepted)),
            "jaxserve:steps": ("Steps of the engine.", c.steps),
            "jaxserve:handovers_missed": (
                "Requests to which another engine did not give the pages that it had for them.",
                c.handovers_missed,
            ),
            "jaxserve:context_cache_dropped_pages": (
                "Pages that no tier was given: too many were on their way off the device.",
                c.pages_dropped,
            ),
        }
        for name, (text, value) in gauges.items():
            yield self._with(GaugeMetricFamily(name, text, labels=tuple(self._labels)), value)
        for name, (text, value) in sums.items():
            yield self._with(CounterMetricFamily(name, text, labels=tuple(self._labels)), value)
        places = {str(place): held for place, held in enumerate(c.accepted)}
        yield self._split(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Guesses that held, by place.", "position", places
        )
        compiled = {"warmup": c.compiled, "late": c.late_compiled}
        programs = "Programs compiled or loaded; late ones made a step wait."
        yield self._split("jaxserve:compilations", programs, "when", compiled)
        seconds = {
            "schedule": c.schedule_seconds, "device": c.device_seconds, "read": c.read_seconds,
            "exposed": c.exposed_seconds,
        }  # fmt: skip
        yield self._split("jaxserve:step_seconds", "Of steps; exposed: the device had nothing to do.", "part", seconds)

        for field in fields(TierCounters):
            text = f"Of the context cache, by tier: {TIERS[field.name]}."
            values = {tier: getattr(counters, field.name) for tier, counters in c.tiers.items()}
            if values:
                yield self._split(f"jaxserve:context_cache_{field.name}", text, "tier", values)

    def _with(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric(list(self._labels.values()), value)
        return family

    def _split(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = CounterMetricFamily(name, text, labels=(*self._labels, label))
        for each, value in values.items():
            family.add_metric([*self._labels.values(), each], value)
        return family


TIERS = {
    "hits": "pages that were found",
    "misses": "pages that were not",
    "read_bytes": "bytes of pages that were found",
    "written_bytes": "bytes of pages that were kept",
    "read_seconds": "seconds of looking",
    "write_seconds": "seconds of keeping",
    "evicted": "pages that made room for others",
    "damaged": "pages that were not what had been kept",
    "failed": "operations that a disk or server refused",
    "dropped": "pages that were not kept: too many, too large, or a server that is down",
}


class LoadCollector(Collector):
    """How evenly the tokens were spread over the experts."""

    def __init__(self, load: ExpertLoad, labels: dict[str, str]):
        self._load, self._labels = load, labels

    def collect(self) -> Iterator[Metric]:
        if self._load.last is None:
            return
        text = "Tokens of a layer's most loaded expert, over the mean of its experts; 1 is even."
        family = GaugeMetricFamily("jaxserve:expert_load_imbalance", text, labels=(*self._labels, "layer"))
        for layer, load_e in zip(self._load.layers, self._load.last, strict=True):
            if load_e.any():
                family.add_metric([*self._labels.values(), str(layer)], load_e.max() / load_e.mean())
        yield family
