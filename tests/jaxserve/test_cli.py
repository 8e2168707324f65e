import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import jaxserve
from jaxserve.checkpoints.hub import EMBEDDED
from jaxserve.cli.main import app
from tests.jaxserve.conftest import GOLDENS, word_tokenizer

MAIN = "from jaxserve.cli.main import main; "
INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # not so in the background


def run(*arguments: str, code: str = MAIN + "main()", stdin: str | bytes = "", **environment: str):
    """What `jaxserve` says to these arguments, and its status."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        env=os.environ | {"COLUMNS": "120", "NO_COLOR": "1"} | environment,
        timeout=300,
    )
    return subprocess.CompletedProcess(
        result.args, result.returncode, result.stdout.decode(), result.stderr.decode(errors="replace")
    )


@pytest.fixture
def tiny(tiny_folder) -> tuple[str, ...]:
    """Options for a model that compiles sooner than the embedded one."""
    return "--model", str(tiny_folder), "--max-model-len", "16"


# -- generate --


def test_generate_streams_the_prompt_and_its_continuation_and_ends_with_its_speed():
    result = run("generate", "def quicksort(items):", "--max-tokens", "12")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def quicksort(items):")
    assert len(result.stdout.rstrip()) > len("def quicksort(items):")
    for word in ("12 tokens", "first after", "tokens/s", "weights", "cache"):
        assert word in result.stderr
    assert "warning" not in result.stderr


def test_on_emulated_devices_the_text_is_the_same(tiny):
    given = "generate", "t5 t7", *tiny, "--max-tokens", "6", "--seed", "3"
    alone, spread = run(*given), run(*given, "--mesh", "2x2")
    assert spread.returncode == 0, spread.stderr
    assert spread.stdout == alone.stdout


def test_a_mesh_that_is_none_or_too_large_is_named(tiny):
    assert "mesh '22': it must be nodes x devices of a node, like 2x4" in run("generate", "t5", "--mesh", "22").stderr
    result = run("generate", "t5", "--mesh", "2x4", "--devices", "4")
    assert (result.returncode, "a mesh of 2x4 needs 8 devices; there are 4" in result.stderr) == (2, True)


def test_generate_reads_its_prompt_from_standard_input(tiny):
    result = run("generate", "-", *tiny, "--max-tokens", "4", stdin="t5 t7\n")
    assert result.stdout.startswith("t5 t7\n")


def test_an_answer_cut_for_want_of_room_says_so(tiny):
    result = run("generate", "t5 t7", *tiny, "--temperature", "0")
    assert result.returncode == 0, result.stderr
    assert "cut after 14 of 128 tokens, for want of room; raise --max-model-len" in result.stderr


def test_without_a_place_for_compiled_programs_one_line_says_so(tiny, tmp_path):
    (tmp_path / "file").touch()
    result = run("generate", "t5", *tiny, "--max-tokens", "2", XDG_CACHE_HOME=str(tmp_path / "file"))
    assert result.returncode == 0
    first, empty, speed = result.stderr.splitlines()
    assert first.startswith("warning: compiled programs can't be kept for the next time: ")
    assert (empty, speed.partition(" | ")[0]) == ("", "2 tokens")


def test_a_warning_about_a_checkpoint_is_one_line(tmp_path):
    shutil.copytree(GOLDENS / "deepseek_v3", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text(word_tokenizer(config["vocab_size"]).to_json())
    result = run("generate", "t5", "--max-tokens", "2", "--model", str(tmp_path), "--max-model-len", "16")
    assert result.stderr.splitlines()[0].startswith("warning: config.json announces 1 MTP layer(s)")
    assert len(result.stderr.splitlines()) == 3


# -- info --


def test_info_needs_the_config_alone(tmp_path):
    (tmp_path / "config.json").write_text((EMBEDDED / "config.json").read_text())
    result = run("info", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for word in ("deepseek_v3", "16 of 64, 4 a token", "routed experts", "7,838,400", "cache of a token"):
        assert word in result.stdout


def test_info_cuts_nothing_on_a_narrow_terminal_and_shows_a_folder_by_its_name(tmp_path):
    folder = tmp_path / "[red]x:smile:"
    folder.mkdir()
    (folder / "config.json").write_text((EMBEDDED / "config.json").read_text())
    result = run("info", str(folder), COLUMNS="40")
    assert result.stdout.splitlines()[0] == f"deepseek_v3  {folder}"
    assert "…" not in result.stdout
    for number in ("1,048,576", "23,888", "7,838,400", "14.95 MiB"):
        assert f"  {number}\n" in result.stdout


def test_latents_in_int8_are_an_option_of_what_generates_describes_and_plans():
    commands = ("info",), ("plan",), ("generate", "def f(x):", "--max-tokens", "2", "--max-model-len", "64")
    shown = [run(*command, "--kv-cache-dtype", "int8") for command in commands]
    assert [result.returncode for result in shown] == [0, 0, 0]
    assert "700 B" in shown[0].stdout  # of a token, in seven layers: 64 codes, their scale, 16 keys of 16 bits
    assert "memory of a rank, in bfloat16, latents in INT8" in shown[1].stdout
    assert "tokens/s" in shown[2].stderr


# -- eval --


def test_eval_prints_scores_keeps_all_items_and_compares_with_what_was_kept(tiny_folder, tmp_path):
    kept, model = str(tmp_path / "float.json"), str(tiny_folder)
    first = run("eval", model, "--tasks", "perplexity, keyword", "--limit", "3", "--out", kept)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(f"{model}, float32, Python 3.")
    assert "  keyword" in first.stdout and "in percent" in first.stdout
    items = json.loads(Path(kept).read_text())["tasks"]["keyword"]["items"]
    assert len(items) == 3 and all(len(item["log2"]) == 4 for item in items)
    again = run("eval", model, "--tasks", "perplexity,keyword", "--limit", "3", "--against", kept, "--json")
    found = json.loads(again.stdout)
    assert found["tasks"] == found["against"]["tasks"]
    assert found["differences"]["keyword"] | {"by": 0} == {"by": 0, "gained": 0, "lost": 0, "p": 1.0}


def test_eval_compares_a_model_in_int8_with_itself():
    result = run(
        "eval", "--tasks", "keyword", "--limit", "2", "--quantization", "int8", "--against-quantization", "none"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0].startswith("A: embedded, float32, matrices in INT8, Python 3.")
    assert result.stdout.splitlines()[1].startswith("B: embedded, float32, Python 3.")
    assert "only A" in result.stdout


def test_eval_refuses_what_was_kept_of_other_items_before_it_loads_a_model(tmp_path):
    other = {"model": "x", "python": "3.9", "tasks": {"keyword": {"scoring": "sum", "fingerprint": "0", "items": []}}}
    (tmp_path / "a.json").write_text(json.dumps(other))
    result = run("eval", "nowhere", "--tasks", "keyword", "--against", str(tmp_path / "a.json"))
    assert result.returncode == 2
    assert "keyword: x had other items (python 3.9); evaluate both" in result.stderr


# -- what goes wrong --


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "x", "--model", "[red]x"), "[red]x is no folder here"),
        (("generate", "x", "--temperature", "-1"), "temperature = -1.0: it must be"),
        (("generate", "x", "--max-model-len", "1"), "max_model_len = 1: it must be"),
        (("generate", "x", "--kv-cache-dtype", "fp8"), "Invalid value for '--kv-cache-dtype'"),
        (("generate", "x", "--max-token", "3"), "No such option: --max-token"),
        (("generate", "x", "--seed", "y"), "Invalid value for '--seed'"),
        (("generate",), "Missing argument 'prompt'; --help lists what there is"),
        (("generat",), "No such command 'generat'. Did you mean 'generate'?"),
        (("info", "nowhere"), "nowhere is no folder here"),
        (("info", "--dtype", "int3"), "dtype 'int3' is not supported"),
        (("eval", "nowhere"), "nowhere is no folder here"),
        (("eval", "--tasks", "brackets"), "there is no task 'brackets'; there are perplexity"),
        (("eval", "--limit", "0"), "Invalid value for '--limit'"),
        (("eval", "--out", "nowhere/a.json"), "--out nowhere/a.json: "),
        (("eval", "--against", "pyproject.toml"), "pyproject.toml holds no results"),
        (("eval", "--url", "http://127.0.0.1:1"), "no server at http://127.0.0.1:1"),
        (("eval", "--model", "x"), "--model x is a name at a server; give --url too"),
        (("eval", "--url", "x", "--quantization", "int8"), "--quantization is for a model in this process; leave it"),
        (("eval", "--url", "x", "--dtype", "float32"), "--dtype is for a model in this process; leave it out"),
        (("eval", "--against", "Makefile", "--against-quantization", "int8"), "--against-quantization is for a model"),
    ],
)
def test_bad_input_is_told_in_one_line_with_status_two(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert result.stdout == ""


def test_standard_input_that_is_not_utf8_is_refused_with_its_place():
    result = run("generate", "-", stdin=b"ab\xff")
    assert result.stderr.startswith("error: standard input is not UTF-8 (byte 0xff at 2)")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)


def test_standard_input_that_is_closed_is_refused():
    result = run("generate", "-", code="import sys; sys.stdin = None; " + MAIN + "main()")
    assert result.stderr.startswith("error: standard input is closed")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)


def test_a_reader_that_goes_away_ends_the_answer_quietly():
    command = [sys.executable, "-c", MAIN + "main()", "generate", "def f(x):", "--seed", "5", "--max-tokens", "4000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(9) == b"def f(x):"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("arguments", [["info"], ["generate", "x", "--max-tokens", "2"], ["--help"]])
def test_output_that_can_not_be_written_is_told_in_one_line(arguments):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", MAIN + "main()", *arguments]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.stderr == "error: [Errno 28] No space left on device\n"
    assert result.returncode == 1


def test_what_the_terminal_can_not_spell_is_escaped(tiny):
    result = run("generate", "é", *tiny, "--max-tokens", "2", PYTHONIOENCODING="ascii")
    assert result.stdout.startswith("\\xe9")


def test_ctrl_c_ends_an_answer_with_status_130():
    code = INTERRUPTIBLE + MAIN + "main()"
    command = [sys.executable, "-c", code, "generate", "def f(x):", "--seed", "5", "--max-tokens", "4000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(12)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().endswith(b"\n")
        assert process.stderr.read() == b""
    assert process.returncode == 130


def test_ctrl_c_that_falls_where_nothing_can_be_raised_ends_the_program_too():
    interrupt = "import gc\ndef callback(*_): raise KeyboardInterrupt\ngc.callbacks.append(callback)\n"
    result = run("info", code=f"{MAIN}\n{interrupt}main()")
    assert (result.returncode, result.stderr) == (130, "")


# -- help --


def test_help_teaches_with_examples_and_does_not_wait_for_jax():
    assert 'jaxserve generate "def quicksort(items):"' in run("generate", "--help").stdout
    code = "import sys, jaxserve.cli.main; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_options_are_shown_whole_on_a_narrow_terminal():
    shown = run("generate", "--help", COLUMNS="40").stdout
    for option in ("--model", "--max-tokens", "--temperature", "--max-model-len"):
        assert option in shown


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "up", "quantize", "plan", "eval", "bench serve"])
def test_examples_are_shown_as_they_are_written_on_eighty_columns(command):
    group = typer.main.get_command(app)
    for name in command.split():
        group = group.commands[name]
    examples = [line for line in group.callback.__doc__.splitlines() if line.startswith((" " * 8, "    jaxserve "))]
    shown = run(*command.split(), "--help", COLUMNS="80").stdout.splitlines()
    assert examples
    assert {line.strip() for line in examples} <= {line.strip() for line in shown}


def test_without_a_command_help_is_shown():
    result = run()
    assert (result.returncode, result.stdout) == (2, run("--help").stdout)


def test_the_version_is_that_of_the_package():
    assert run("--version").stdout == f"jaxserve {jaxserve.__version__}\n"
    assert jaxserve.__version__[0].isdigit()


def test_a_checkout_that_is_not_installed_has_no_known_version():
    code = "import importlib.metadata as m\ndef version(name): raise m.PackageNotFoundError\nm.version = version\n"
    assert run(code=code + "import jaxserve; print(jaxserve.__version__)").stdout == "0+unknown\n"
