import dataclasses

import gguf
import numpy as np
import pytest

from benchmarks.peers import gguf_file
from benchmarks.peers.check import write_tiny
from jaxserve.checkpoints.hf import read_json
from jaxserve.checkpoints.safetensors import open_folder
from jaxserve.layers.config import Config, Yarn
from jaxserve.parallel.errors import ConfigError


def read(path):
    """All values of the metadata, and all tensors in float32, as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}, reader.tensors


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    write_tiny(folder, "bench-1b")
    return folder


def test_heads_and_experts_lie_as_llama_cpp_wants_them(mixture, tmp_path):
    gguf_file.write(mixture, tmp_path / "model.gguf", "float32")
    raw, hf = read_json(mixture), {name: tensor.read() for name, tensor in open_folder(mixture).items()}
    _, made, _ = read(tmp_path / "model.gguf")
    kv_b = hf["model.layers.2.self_attn.kv_b_proj.weight"]
    h, n, v = (raw[name] for name in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    for head in range(h):
        begin = head * (n + v)
        np.testing.assert_array_equal(made["blk.2.attn_k_b.weight"][head], kv_b[begin : begin + n].T)
        np.testing.assert_array_equal(made["blk.2.attn_v_b.weight"][head], kv_b[begin + n : begin + n + v])
    for expert in range(raw["n_routed_experts"]):
        for part in ("gate", "up", "down"):
            wanted = hf[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"]
            np.testing.assert_array_equal(made[f"blk.1.ffn_{part}_exps.weight"][expert], wanted)


@pytest.mark.parametrize("name", ["bench-1b", "bench-dense"])
def test_every_weight_is_there_once(name, tmp_path):
    write_tiny(tmp_path, name)
    gguf_file.write(tmp_path, tmp_path / "model.gguf", "float32")
    _, made, _ = read(tmp_path / "model.gguf")
    total = lambda arrays: sum(np.square(array, dtype=np.float64).sum() for array in arrays)  # noqa: E731
    hf = [tensor.read() for tensor in open_folder(tmp_path).values()]
    assert sum(array.size for array in made.values()) == sum(array.size for array in hf)
    assert total(made.values()) == pytest.approx(total(hf), rel=1e-9)


def test_metadata_is_the_config(mixture, tmp_path):
    gguf_file.write(mixture, tmp_path / "model.gguf", "int8")
    fields, _, _ = read(tmp_path / "model.gguf")
    raw = read_json(mixture)
    names = {
        "block_count": raw["num_hidden_layers"],
        "attention.head_count": raw["num_attention_heads"],
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": raw["kv_lora_rank"],
        "attention.q_lora_rank": 0,
        "attention.key_length_mla": raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"],
        "attention.value_length_mla": raw["v_head_dim"],
        "expert_count": raw["n_routed_experts"],
        "expert_used_count": raw["num_experts_per_tok"],
        "expert_shared_count": raw["n_shared_experts"],
        "expert_weights_norm": raw["norm_topk_prob"],
        "leading_dense_block_count": raw["first_k_dense_replace"],
        "vocab_size": raw["vocab_size"],
        "rope.freq_base": raw["rope_theta"],
    }
    assert {name: fields[f"deepseek2.{name}"] for name in names} == names


def test_matrices_are_rounded_to_8_bits_and_routers_and_vectors_are_not(mixture, tmp_path):
    gguf_file.write(mixture, tmp_path / "exact.gguf", "float32")
    gguf_file.write(mixture, tmp_path / "rounded.gguf", "int8")
    _, exact, _ = read(tmp_path / "exact.gguf")
    _, rounded, tensors = read(tmp_path / "rounded.gguf")
    plain = {t.name for t in tensors if t.tensor_type == gguf.GGMLQuantizationType.F32}
    assert plain == {name for name in exact if name.endswith(("norm.weight", "ffn_gate_inp.weight"))}
    for name, values in exact.items():
        largest = np.abs(values).max()  # its block has the coarsest steps
        bound = largest / 127 / 2 + largest * 2**-11  # half a step, and the scale's own rounding, to 16 bits
        assert np.abs(rounded[name] - values).max() <= (0 if name in plain else bound)


def test_what_is_not_written_is_refused_by_name(mixture, monkeypatch, tmp_path):
    cfg = Config.from_hf(read_json(mixture))
    yarn = dataclasses.replace(cfg, rope=dataclasses.replace(cfg.rope, yarn=Yarn(4.0, 1024)))
    monkeypatch.setattr(gguf_file.Config, "from_hf", lambda raw: yarn)
    with pytest.raises(ConfigError, match="its positions are YaRN's"):
        gguf_file.write(mixture, tmp_path / "model.gguf", "int8")
    assert not list(tmp_path.iterdir())
