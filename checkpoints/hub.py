"""Finding a model: the embedded one, a folder, or a name on the Hugging Face hub."""

from pathlib import Path

from jaxserve.parallel.errors import CheckpointError

EMBEDDED = Path(__file__).parent / "embedded" / "model"
WANTED = ("*.json", "*.safetensors", "*.jinja")
TOKENIZER_FILES = ("*.json", "*.jinja")


def locate(model: str | Path | None, wanted: tuple[str, ...] = WANTED) -> Path:
    """The folder of a model; of a name like `deepseek-ai/DeepSeek-V3`, files are fetched.

    None is the embedded model, and so is "embedded", unless a folder has that name.

    `wanted` are patterns of the files to fetch.

    Raises CheckpointError that says what was looked for, and where.
    """
    if model is None:
        return EMBEDDED
    if not str(model):  # as a path it would be the folder one stands in
        raise CheckpointError("model = '' is neither a folder nor a name on the hub; None is the embedded model")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if str(model) == "embedded":
        return EMBEDDED
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; name the folder that holds config.json and the weights")
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise CheckpointError(f"{model} is no folder here, and no name on the hub (those look like owner/name)")
    return _fetch(str(model), wanted)


def _fetch(name: str, wanted: tuple[str, ...]) -> Path:
    import huggingface_hub  # slow to import, and rarely needed
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(wanted)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise CheckpointError(
            f"{name} is no folder here, and could not be fetched from the hub ({type(error).__name__}: {reason}). "
            "Check the name and the network, or name a folder."
        ) from error


def check_new(folder: Path) -> None:
    """Raises CheckpointError if there is something: nothing is overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise CheckpointError(f"{folder} exists and {what}; name another folder")
