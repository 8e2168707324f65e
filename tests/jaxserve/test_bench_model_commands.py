import json

import pytest

from tests.jaxserve.test_cli import MAIN, run

SMALL = MAIN + "from jaxserve.bench import limits; limits.READ = 1 << 20; limits.SHAPES = ((16, 32, 64),); main()"
"""The program, with limits that are found at once."""


def measured(command, tmp_path, tiny_folder, *given):
    """What a command shows of a tiny model, and the numbers that it keeps."""
    out = tmp_path / "numbers.json"
    model = "--model", str(tiny_folder), "--out", str(out)
    result = run("bench", command, *model, *given, code=SMALL)
    assert result.returncode == 0, result.stderr
    kept = json.loads(out.read_text())
    assert kept["command"] == command and kept["options"]["repetitions"] == 2
    assert {"processor", "jax", "device", "cores"} <= kept["machine"].keys() and {"commit", "date"} <= kept.keys()
    return result.stdout.splitlines(), kept


def test_decode_tells_speed_and_share_of_the_roofline(tmp_path, tiny_folder):
    plot = tmp_path / "roofline.svg"
    given = "--batch", "1,3", "--context", "20", "--repetitions", "2", "--plot", str(plot)
    (title, head, *rows), kept = measured("decode", tmp_path, tiny_folder, *given)
    assert title.endswith("decoding after 20 tokens")
    assert head.split() == ["batch", "ms", "p10-p90", "tokens/s", "MB", "GFLOP", "roofline", "limit"]
    assert [row.split()[0] for row in rows[:2]] == ["1", "3"]
    assert rows[-1].startswith("this machine reads ")
    one, three = kept["results"]
    assert (one["batch"], three["batch"], len(one["seconds"])) == (1, 3, 2)
    for result in (one, three):
        memory = result["bytes"] / kept["limits"]["bandwidth"]
        compute = sum(count / kept["limits"]["peaks"][kind] for kind, count in result["operations"].items())
        assert result["ideal_seconds"] == pytest.approx(max(memory, compute))
        assert result["share"] == pytest.approx(result["ideal_seconds"] / result["median"])
        assert result["p10"] <= result["median"] <= result["p90"]
    assert plot.read_text().startswith("<?xml")


def test_prefill_tells_the_time_of_prompts(tmp_path, tiny_folder):
    given = "--prompt-tokens", "20", "--repetitions", "2", "--plot", str(tmp_path / "roofline.png")
    (title, *_), kept = measured("prefill", tmp_path, tiny_folder, *given)
    assert title.endswith("prefill")
    (found,) = kept["results"]
    assert (found["tokens"], len(found["seconds"])) == (20, 2)
    assert (tmp_path / "roofline.png").exists()


@pytest.mark.slow
def test_throughput_answers_all_requests(tmp_path, tiny_folder):
    given = "--requests", "3", "--prompt-tokens", "4-9", "--output-tokens", "2", "--batch", "1", "--repetitions", "2"
    lines, kept = measured("throughput", tmp_path, tiny_folder, *given)
    assert lines[0].endswith("3 requests at once, 1 run together")
    assert (kept["result"]["requests"], kept["result"]["output_tokens"]) == (3, 6)


def test_layers_tell_each_part_of_a_step(tmp_path, tiny_folder):
    given = "--phase", "decode", "--batch", "2", "--context", "20", "--repetitions", "2"
    lines, kept = measured("layers", tmp_path, tiny_folder, *given, "--plot", str(tmp_path / "parts.svg"))
    (found,) = kept["results"]
    names = ["embedding", "projections", "attention", "dense network", "head", "choice"]
    assert [part["name"] for part in found["parts"]] == names
    for name in (*names, "the rest", "the step"):
        assert any(line.strip().startswith(name) for line in lines), name


@pytest.mark.slow
def test_startup_tells_where_the_time_goes(tmp_path, tiny_folder):
    (title, head, *rows), kept = measured("startup", tmp_path, tiny_folder, "--repetitions", "2")
    assert head.split() == ["seconds", "cold", "warm", "p10-p90"]
    cold, warm = kept["result"]["cold"], kept["result"]["warm"]
    assert list(cold) == list(warm[0]) and len(warm) == 2 and min(cold.values()) >= 0
    assert "compiling" in cold and "first token" in cold
    assert any("from jaxserve import LLM" in row for row in rows)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("decode", "--batch", "1,x"), "--batch 1,x: it must be whole numbers from 1 on, like 1,4,16"),
        (("decode", "--batch", "0"), "--batch 0: it must be whole numbers from 1 on"),
        (("prefill", "--prompt-tokens", ""), "--prompt-tokens : it must be whole numbers"),
        (("throughput", "--prompt-tokens", "9-3"), "'9-3' is no number of tokens"),
        (("startup", "--model", "bench-1b"), "`jaxserve bench model bench-1b FOLDER` writes them"),
        (("layers", "--plot", "x.txt"), "--plot x.txt: it must end in .png or .svg"),
        (("decode", "--model", "./none"), "./none is no folder here"),
        (("decode", "--out", "/none/x.json"), "--out /none/x.json: it must be a file, in a folder that is there"),
        (("model", "huge", "x"), "'huge' is no standard model; there are bench-1b, bench-dense, bench-v2-lite"),
    ],
)
def test_what_can_not_be_measured_is_told_at_once(given, said):
    result = run("bench", *given)
    assert result.returncode == 2
    assert said in result.stderr and "Traceback" not in result.stderr
