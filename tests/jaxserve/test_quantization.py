import json

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.checkpoints.quantize import LayerReport, Step
from jaxserve.parallel.errors import CheckpointError, RequestError
from jaxserve.quantization import columns, head, quantize, rows, starved
from tests.jaxserve.test_cli import run

REPORTS = [
    LayerReport({"attn": [Step("rounding", 2e-4), Step("scales", 1e-4)]}, ("attn.w_kr", "attn.w_dkv"), ()),
    LayerReport({"join": [Step("rounding", 3e-3)], "ffn": [Step("rounding", 0.5)]}, ("ffn.experts.w_up",), (3, 7)),
]
QUICK = ("--sequences", "2", "--length", "8")
PARTS = "outliers", "scales", "clipping", "compensation", "mixed"
BUT_COMPENSATION = tuple(word for part in PARTS if part != "compensation" for word in ("--without", part))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A text of the tiny model's words."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"t{i * i % 90}" for i in range(60)))
    return path


def test_a_row_tells_what_is_lost_after_each_part_and_what_stayed():
    assert columns(REPORTS) == ["rounding", "scales"]
    assert head(columns(REPORTS)) == ("layer", "block", "rounding", "scales", "in float")
    assert rows(REPORTS) == [
        ("0", "attn", "200", "100", "w_kr, w_dkv"),
        ("1", "join", "3,000", "", ""),
        ("1", "ffn", "500,000", "", "experts.w_up"),
    ]


def test_experts_that_few_tokens_chose_are_told():
    (line,) = starved(REPORTS)
    assert "layer 1: fewer than 40 tokens chose the experts 3, 7" in line


def test_the_command_writes_a_model_that_generates(tiny_folder, words, tmp_path):
    out = tmp_path / "int8"
    result = run("quantize", str(tiny_folder), str(out), "--text", str(words), *QUICK, *BUT_COMPENSATION)
    assert result.returncode == 0, result.stderr
    table = result.stdout.splitlines()
    assert table[1].split() == ["layer", "block", "rounding", "compensation", "in", "float"]
    assert [line.split()[:2] for line in table[2:4]] == [["0", "attn"], ["0", "ffn"]]
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format"] == "int-quantized"
    answer = run("generate", "t5 t7", "--model", str(out), "--max-model-len", "16", "--max-tokens", "4")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("t5 t7")


def test_both_formats_hold_the_same_model(tiny_folder, words, tmp_path):
    given = [words], (2, 8), [part for part in PARTS if part != "compensation"]
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    answers = []
    for form in ("compressed-tensors", "orbax"):
        quantize(str(tiny_folder), tmp_path / form, *given, form, lambda *_: None)
        llm = LLM(tmp_path / form, max_model_len=16, max_num_seqs=1, warmup=False)
        answers.append(llm.generate("t5 t7", greedy)[0].outputs[0].token_ids)
    assert answers[0] == answers[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compressed-tensors", "orbax"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--without", "magic"), "--without magic: there is no such part; there are outliers, scales"),
        (("--length", "99999"), "--length 99999: the model has"),
        (("--text", "nowhere.txt"), "--text nowhere.txt can't be read"),
        (("--sequences", "900"), "the text has 60 tokens"),
    ],
)
def test_what_can_not_be_done_is_told_in_one_line(tiny_folder, words, tmp_path, arguments, message):
    result = run("quantize", str(tiny_folder), str(tmp_path / "out"), "--text", str(words), *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(tiny_folder, words, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for form in ("compressed-tensors", "orbax"):
        with pytest.raises(CheckpointError, match="is not empty"):
            quantize(str(tiny_folder), tmp_path, [words], (2, 8), [], form, lambda *_: None)
    with pytest.raises(RequestError, match="no such part"):
        quantize(str(tiny_folder), tmp_path / "new", [words], (2, 8), ["none"], "orbax", lambda *_: None)
