import os
import subprocess
import sys

import pytest

from jaxserve.checkpoints.hub import EMBEDDED


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "jaxserve.cli", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=300)


def test_generate_streams_the_prompt_and_its_continuation_and_ends_with_its_speed():
    result = run("generate", "def quicksort(items):", "--max-tokens", "12")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("def quicksort(items):")
    assert len(result.stdout.rstrip()) > len("def quicksort(items):")
    for word in ("12 tokens", "first after", "tokens/s", "weights", "cache"):
        assert word in result.stderr


def test_generate_reads_its_prompt_from_standard_input():
    result = run("generate", "-", "--max-tokens", "4", stdin="import os\n")
    assert result.stdout.startswith("import os\n")


def test_info_needs_the_config_alone(tmp_path):
    (tmp_path / "config.json").write_text((EMBEDDED / "config.json").read_text())
    result = run("info", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for word in ("deepseek_v3", "16 of 64, 4 a token", "routed experts", "7,838,400", "cache of a token"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "x", "--model", "nowhere"), "nowhere is no folder here"),
        (("generate", "x", "--temperature", "-1"), "temperature = -1.0: it must be"),
        (("info", "nowhere"), "nowhere is no folder here"),
        (("info", "--dtype", "int3"), "dtype 'int3' is not supported"),
    ],
)
def test_bad_input_is_told_in_one_line_with_status_two(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_help_teaches_with_examples_and_does_not_wait_for_jax():
    assert 'jaxserve generate "def quicksort(items):"' in run("generate", "--help").stdout
    code = "import sys, jaxserve.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
