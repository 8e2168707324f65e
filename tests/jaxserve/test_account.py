"""DeepSeek-V3 at its real size, on meshes that aren't there."""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve.account import Account, account, as_json, fit_machine, traffic_rows
from jaxserve.layers.config import Config
from jaxserve.options import EngineConfig
from jaxserve.parallel.errors import RequestError, ShardingError
from jaxserve.parallel.mesh import Topology, abstract_mesh
from tests.jaxserve.test_cli import run
from tests.layers.published import DEEPSEEK_V3

ROOT = Path(__file__).parents[2]
CONTEXT, PAGE = 4096, 64
DIES = Topology.named("cloudmatrix384-dies")

# Parameters by the published sizes, without any code of the project.
NORMS = 2 * 7168
OWN_HEADS = 128 * (192 * 1536 + 2 * 128 * 512)  # q_b_proj, kv_b_proj
ATTENTION = OWN_HEADS + 1536 * 7168 + 1536 + (512 + 64) * 7168 + 512 + 7168 * 128 * 128
EXPERT, ROUTER, DENSE = 3 * 7168 * 2048, 256 * 7168, 3 * 7168 * 18432
EMBEDDINGS = 2 * 129280 * 7168 + 7168
MODULE = 3 * 7168 + 7168 * 2 * 7168


def v3(phase, nodes: int, int8: bool = False, **options) -> Account:
    size = {"max_model_len": CONTEXT, "page_size": PAGE, "num_speculative_tokens": 0, "num_redundant_experts": 32}
    config = EngineConfig(**(size | options), num_pages=options["max_num_seqs"] * CONTEXT // PAGE)
    return account(Config.from_hf(DEEPSEEK_V3), config, jnp.bfloat16, abstract_mesh(nodes, 16), phase, int8)


def weights(slots: int, shared: int, heads: int = 128) -> int:
    """Bytes of a rank: so many routed experts a layer, and shared ones, and so many heads outside of the MTP module."""
    fewer = OWN_HEADS * (128 - heads) // 128
    layer = ATTENTION + NORMS + ROUTER + (slots + shared) * EXPERT
    total = EMBEDDINGS + 3 * (ATTENTION - fewer + NORMS + DENSE) + 58 * (layer - fewer) + layer + MODULE
    return 2 * total + 59 * 4 * 256  # the bias of routers is float32


ROUTES = 59 * 4 * (257 * 64 + 257)  # at most 64 replicas of 257 experts


@pytest.fixture(scope="module")
def decoding() -> Account:
    before, began = sum(a.nbytes for a in jax.live_arrays()), time.monotonic()
    found = v3("decode", 20, max_num_seqs=96, num_shared_expert_ranks=32)
    assert time.monotonic() - began < 60  # two seconds, on a machine that does nothing else
    assert sum(a.nbytes for a in jax.live_arrays()) - before < 1 << 20
    return found


def test_a_rank_of_ep320_holds_one_expert_a_layer_and_all_else_and_its_own_cache(decoding):
    assert decoding.keeps.weights == weights(slots=1, shared=0) + ROUTES
    assert decoding.keeps.cache == 96 * CONTEXT * 62 * (512 + 64) * 2
    assert decoding.tokens == 96


@pytest.fixture(scope="module")
def decoding_in_int8() -> Account:
    return v3("decode", 20, int8=True, max_num_seqs=96, num_shared_expert_ranks=32)


def test_decode_at_ep320_meets_in_two_exchanges_a_mixture_whose_buffers_are_the_papers(decoding, decoding_in_int8):
    found = {one.scope: (one.kind, one.dtype, one.nbytes, count) for one, count in decoding_in_int8.traffic.items()}
    assert found == {
        "moe/dispatch": ("all-to-all", "uint8", 320 * 96 * 7176, 58),
        "moe/combine": ("all-to-all", "uint16", 320 * 96 * 14336, 58),
    }
    assert [size / 2**20 for size in decoding.buffers["published"]] == [225, 420]
    assert decoding_in_int8.buffers["traced"] == (320 * 96 * 7176, 420 * 2**20)
    assert decoding.buffers["traced"] == (320 * 96 * 14340, 420 * 2**20)
    assert decoding.filled == pytest.approx(9 / 320)


def test_weights_in_int8_are_half_as_large_but_for_scales_and_what_stays(decoding, decoding_in_int8):
    kept = 2 * (EMBEDDINGS + 59 * ROUTER + 62 * 128 * 2 * 128 * 512) + ROUTES  # kv_b_proj, too
    halved = (decoding.keeps.weights - kept) / 2 + kept
    assert decoding_in_int8.keeps.weights == pytest.approx(halved, rel=0.005)
    assert decoding_in_int8.keeps.weights > halved


def test_with_the_module_48_answers_a_rank_send_as_many_tokens_as_96_without():
    found = v3(
        "decode", 20, max_num_seqs=48, num_shared_expert_ranks=32, num_speculative_tokens=1, speculation_max_seqs=48
    )
    counts = {one.scope: (one.nbytes, count) for one, count in found.traffic.items()}
    assert found.tokens == 96
    assert counts["moe/dispatch"] == (320 * 96 * 14340, 58)
    assert counts["draft/moe/dispatch"] == (320 * 48 * 14340, 1)


def test_prefill_at_ep32_gathers_latents_exchanges_heads_and_holds_its_own_heads_alone():
    found = v3("prefill", 2, max_num_seqs=8, max_num_batched_tokens=16384)
    routes = 59 * 4 * (256 * 33 + 256)
    assert found.tokens == 512
    assert found.weights == {
        "PREFILL": weights(slots=9, shared=1, heads=4) + routes,
        "DECODE": weights(slots=9, shared=1) + routes,
    }
    assert found.keeps.weights == found.weights["PREFILL"]
    rows = {(one.scope, one.kind): (one.nbytes, one.sent, count) for one, count in found.traffic.items()}
    latents, heads = 512 * (1536 + 512 + 64) * 2, 16384 * 4 * 128 * 2
    assert rows[("attention", "all-gather")] == (latents, 31 * latents, 61)
    assert rows[("attention", "all-to-all")] == (heads, heads * 31 // 32, 61)
    assert rows[("moe/dispatch", "all-to-all")][0] == 32 * 512 * 8 * 14340
    assert rows[("", "reduce-scatter")][2] == 1


def test_latents_in_int8_take_644_bytes_a_token_and_are_gathered_so():
    found = v3("prefill", 2, max_num_seqs=8, max_num_batched_tokens=16384, kv_cache_dtype="int8")
    assert found.keeps.cache == 8 * CONTEXT * 62 * (512 + 4 + 2 * 64)
    gathered = [(one.nbytes, count) for one, count in found.traffic.items() if one.kind == "all-gather"]
    assert gathered == [(512 * (2 * 1536 + 644), 61)]


def test_times_are_of_a_machine_that_is_known_and_large_enough(decoding):
    slow = sum(one.seconds(DIES, 16) * count for one, count in decoding.traffic.items())
    assert as_json(decoding, DIES)["step"]["estimated_seconds"] == pytest.approx(slow)
    assert as_json(decoding, None)["step"]["estimated_seconds"] is None
    assert {row[-1] for row in traffic_rows(decoding, None)} == {"-"}
    assert fit_machine("cloudmatrix384-dies", (20, 16)) is DIES
    with pytest.raises(ShardingError, match="h100x8 has 1 nodes of 8 devices; a mesh of 20x16 is not part of it"):
        fit_machine("h100x8", (20, 16))


def test_a_phase_that_is_none_is_refused():
    with pytest.raises(RequestError, match="phase = 'both': it must be one of decode, prefill"):
        account(Config.tiny("qwen3"), EngineConfig(), jnp.float32, abstract_mesh(1, 2), "both")


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_model_without_experts_has_an_account_too(phase):
    cfg = Config.tiny("qwen3")
    found = account(cfg, EngineConfig(num_speculative_tokens=0), jnp.float32, abstract_mesh(1, 2), phase)
    assert (found.filled, found.buffers["published"]) == (0, (0, 0))
    assert bool(found.traffic) == (phase == "prefill")


# -- the command and the page --


def test_the_config_beside_the_page_is_the_published_one():
    assert json.loads((ROOT / "docs/deepseek-v3/config.json").read_text()) == DEEPSEEK_V3


def commands() -> list[tuple[str, str]]:
    """Each command of the page with what it printed."""
    blocks = (ROOT / "docs/supernode.md").read_text().split("```console\n$ jaxserve ")[1:]
    found = [block.partition("```")[0].replace("\\\n", "").partition("\n") for block in blocks]
    return [(command, printed) for command, _, printed in found]


@pytest.mark.parametrize(("command", "printed"), commands(), ids=lambda text: text[-40:])
def test_the_page_has_what_the_command_prints(command, printed):
    result = run(*command.replace("docs/", f"{ROOT}/docs/").split())
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == printed.split()


def test_programs_are_given_bytes_and_seconds():
    result = run("plan", "--mesh", "h100x8", "--max-num-seqs", "4", "--json")
    found = json.loads(result.stdout)
    assert (found["mesh"], found["machine"], found["device_bytes"]) == ([1, 8], "h100x8", 80 * 10**9)
    assert {one["kind"] for one in found["traffic"]} == {"all-to-all"}
    assert found["keeps"]["weights"] > 0 and found["step"]["estimated_seconds"] > 0


def test_what_can_not_be_planned_is_told_in_one_line():
    result = run("plan", "--mesh", "40x16", "--machine", "h100x8")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert result.stderr.startswith("error: h100x8 has 1 nodes of 8 devices")
    assert "'h' of size 6 does not divide" in run("plan", "--phase", "prefill").stderr
