from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from jaxserve.checkpoints import hub
from jaxserve.parallel.errors import CheckpointError

NAME = "owner/name"
RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.fixture
def answer(monkeypatch, tmp_path):
    """Lets the hub answer with an error, or with a folder; gives the calls it got."""

    def set_answer(error: Exception | None = None) -> list[tuple[str, list[str]]]:
        calls = []

        def snapshot_download(name: str, allow_patterns: list[str]) -> str:
            calls.append((name, allow_patterns))
            if error:
                raise error
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return set_answer


def test_no_model_is_the_embedded_one():
    assert (hub.locate(None) / "model.safetensors").is_file()


def test_the_embedded_one_has_a_name_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.locate("embedded") == hub.locate(None)
    (tmp_path / "embedded").mkdir()
    assert hub.locate("embedded") == Path("embedded")


def test_a_folder_is_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert hub.locate(tmp_path) == hub.locate(str(tmp_path)) == hub.locate(f"~/{tmp_path.name}") == tmp_path


def test_of_a_name_the_wanted_files_are_fetched(answer, tmp_path):
    calls = answer()
    assert hub.locate(NAME) == tmp_path
    assert hub.locate(NAME, wanted=("*.json",)) == tmp_path
    assert calls == [(NAME, ["*.json", "*.safetensors", "*.jinja"]), (NAME, ["*.json"])]


@pytest.mark.parametrize("model", [NAME, Path(NAME)])
def test_a_folder_comes_before_a_name(answer, tmp_path, monkeypatch, model):
    calls = answer()
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.locate(model) == Path(NAME)
    assert not calls


@pytest.mark.parametrize(
    "error, reason",
    [
        (
            RepositoryNotFoundError(
                "404 Client Error. (Request ID: Root=1)\n\nRepository Not Found for url: https://hub/owner/name.\n"
                "Please make sure you specified the correct `repo_id`.\nIf it is private, authenticate.",
                response=RESPONSE,
            ),
            "RepositoryNotFoundError: 404 Client Error. (Request ID: Root=1)",
        ),
        (
            HfHubHTTPError("\n\n403 Forbidden: None.\nCannot access content at: https://hub.", response=RESPONSE),
            "HfHubHTTPError: 403 Forbidden: None.",
        ),
        (
            LocalEntryNotFoundError("Got: ConnectError: no route\nAn error happened while trying to locate the files"),
            "LocalEntryNotFoundError: Got: ConnectError: no route",
        ),
        (OSError(), "OSError: no reason given"),
    ],
)
def test_what_cannot_be_fetched_is_told_in_one_line(answer, error, reason):
    answer(error)
    with pytest.raises(CheckpointError) as raised:
        hub.locate(NAME)
    assert str(raised.value).startswith(f"{NAME} is no folder here, and could not be fetched from the hub ({reason}). ")
    assert "\n" not in str(raised.value)


def test_an_empty_name_is_refused(answer):
    with pytest.raises(CheckpointError, match="model = '' is neither a folder nor a name"):
        hub.locate("")


@pytest.mark.parametrize("model", ["name", "./owner", "/owner", "~/owner/name", "owner/name/more", "../name"])
def test_what_cannot_be_a_name_is_not_looked_for_on_the_hub(answer, model):
    calls = answer()
    with pytest.raises(CheckpointError, match="is no folder here, and no name on the hub"):
        hub.locate(model)
    assert not calls


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file; name the folder"):
        hub.locate(tmp_path / "model.safetensors")
