"""What dashboards see, against what was asked."""

import json
import time
from dataclasses import fields

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve import SamplingParams
from jaxserve.counters import Counters
from jaxserve.request import Output, Request
from jaxserve.server import metrics as module
from jaxserve.server.metrics import Metrics
from jaxserve.tiers.counters import TierCounters
from tests.waiting import eventually

pytestmark = pytest.mark.xdist_group("server")


def samples(text: str) -> dict[str, float]:
    """Values by name and by the labels that are not of the model."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            own = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name + (json.dumps(own) if own else "")] = sample.value
    return found


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def metrics():
    return Metrics(Counters, "m")


def request(id="r", n=1):
    return Request(id, (1, 2, 3), SamplingParams(n=n))


def test_times_of_a_request_are_told_apart(metrics, clock):
    metrics.began(request())
    clock[0] += 3.0
    metrics.said([Output("r", token_ids=(5,), queue_seconds=1.0)])
    clock[0] += 0.5
    metrics.said([Output("r", token_ids=(6, 7))])
    clock[0] += 0.25
    metrics.said([Output("r", token_ids=(8,), finish_reason="stop")])
    metrics.left(request(), served=True)
    found = samples(metrics.text().decode())
    expected = {
        "time_to_first_token_seconds": 3.0, "request_queue_time_seconds": 1.0, "request_prefill_time_seconds": 2.0,
        "request_decode_time_seconds": 0.75, "request_inference_time_seconds": 2.75,
        "e2e_request_latency_seconds": 3.75, "request_time_per_output_token_seconds": 0.25,
        "request_prompt_tokens": 3, "request_generation_tokens": 4,
    }  # fmt: skip
    for name, value in expected.items():
        assert found[f"vllm:{name}_sum"] == pytest.approx(value)
        assert found[f"vllm:{name}_count"] == 1
    assert found["vllm:inter_token_latency_seconds_count"] == 3
    assert found["vllm:inter_token_latency_seconds_sum"] == pytest.approx(0.75)
    assert found["vllm:iteration_tokens_total_sum"] == 4
    assert found['vllm:request_success_total{"finished_reason": "stop"}'] == 1


def test_answers_that_nobody_waited_for_are_counted_as_aborted(metrics):
    metrics.began(request(n=3))
    metrics.said([Output("r", 1, token_ids=(5,), finish_reason="length")])
    metrics.left(request(n=3), served=True)
    metrics.said([Output("r", 2, token_ids=(5,), finish_reason="length")])  # it was on its way
    found = samples(metrics.text().decode())
    assert found['vllm:request_success_total{"finished_reason": "abort"}'] == 2
    assert found['vllm:request_success_total{"finished_reason": "length"}'] == 1


def test_what_the_engine_refused_is_no_request(metrics):
    metrics.began(request())
    metrics.left(request(), served=False)
    found = samples(metrics.text().decode())
    assert found["vllm:request_prompt_tokens_count"] == 0
    assert not any(name.startswith("vllm:request_success_total") for name in found)


def test_percentiles_are_those_of_the_last_minute(metrics, clock):
    assert metrics.percentiles() == {"time_to_first_token": None, "inter_token": None, "end_to_end": None}
    for i in range(101):
        metrics.began(request(str(i)))
        came = clock[0]
        clock[0] += i / 1000
        metrics.said([Output(str(i), token_ids=(5,))])
        clock[0] = came
    first = metrics.percentiles()["time_to_first_token"]
    assert first == pytest.approx({"p50": 0.05, "p90": 0.09, "p99": 0.099})
    clock[0] += 61
    assert metrics.percentiles()["time_to_first_token"] is None


def test_the_engine_s_counters_are_shown_as_they_are_when_asked_for():
    counters = Counters(running=2, waiting=3, pages_used=4, pages=16, accepted=[5, 1], wide_rows=8, late_compiled=1)
    found = samples(Metrics(lambda: counters, "m").text().decode())
    assert found["vllm:num_requests_running"] == 2
    assert found["vllm:num_requests_waiting"] == 3
    assert found["vllm:kv_cache_usage_perc"] == 0.25
    assert found["vllm:spec_decode_num_draft_tokens_total"] == 16
    assert found["vllm:spec_decode_num_accepted_tokens_total"] == 6
    assert found['vllm:spec_decode_num_accepted_tokens_per_pos_total{"position": "1"}'] == 1
    assert found['jaxserve:compilations_total{"when": "late"}'] == 1


def test_over_http_the_numbers_are_those_of_what_was_asked(server):
    with server.client() as http:
        before = samples(http.get("/metrics").text)
        body = {"prompt": "import os\n" * 8, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        for _ in range(2):
            assert http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 5
        assert eventually(lambda: not server.llm.engine.busy)
        after = samples(http.get("/metrics").text)
        stats = http.get("/stats").json()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["vllm:generation_tokens_total"] == 10
    assert grown["vllm:time_to_first_token_seconds_count"] == 2
    assert grown["vllm:prompt_tokens_cached_total"] > 0
    assert grown['vllm:request_success_total{"finished_reason": "length"}'] == 2
    assert after["vllm:num_requests_running"] == 0
    assert after["process_resident_memory_bytes"] > 1e8
    assert stats["tokens"]["generated"] == after["vllm:generation_tokens_total"]
    assert stats["latency"]["end_to_end"]["p99"] > 0
    assert stats["requests"] == {"running": 0, "waiting": 0, "slots": 16, "finished": stats["requests"]["finished"]}
    load = stats["experts"]["tokens"]
    shares = [max(layer) / (sum(layer) / len(layer)) for layer in load if sum(layer)]
    shown = [v for name, v in after.items() if name.startswith("jaxserve:expert_load_imbalance")]
    assert shown == pytest.approx(shares)
    assert len(load) == server.llm.engine.cfg.mixtures
    assert stats["experts"]["layers"] == [1, 2, 3, 4, 5, 6]  # the first is dense, the last the MTP module
    assert sum(load[0]) > 0 and sum(load[0]) % server.llm.engine.cfg.experts.per_token == 0


def test_experts_load_is_fetched_at_most_once_a_second(server, monkeypatch):
    calls = []
    fetch = server.llm.engine.expert_load
    monkeypatch.setattr(server.llm.engine, "expert_load", lambda: (calls.append(time.monotonic()), fetch())[1])
    with server.client() as http:
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            assert http.get("/stats").status_code == 200
    assert 1 <= len(calls) <= 4
    assert all(later - earlier >= 1.0 for earlier, later in zip(calls, calls[1:], strict=False))


def test_pages_that_did_not_come_or_were_not_kept_are_counted():
    found = samples(Metrics(lambda: Counters(handovers_missed=2, pages_dropped=5), "m").text().decode())
    assert found["jaxserve:handovers_missed_total"] == 2
    assert found["jaxserve:context_cache_dropped_pages_total"] == 5


def test_tiers_of_the_context_cache_are_told_apart():
    tiers = {"memory": TierCounters(hits=3, read_bytes=300), "disk": TierCounters(hits=1, damaged=2)}
    found = samples(Metrics(lambda: Counters(tiers=tiers), "m").text().decode())
    for field in fields(TierCounters):
        for name, counters in tiers.items():
            shown = found[f"jaxserve:context_cache_{field.name}_total" + json.dumps({"tier": name})]
            assert shown == getattr(counters, field.name)
