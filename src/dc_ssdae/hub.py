"""Models on the Hugging Face hub: fetched as files first, so that they are checked like any folder before they load."""

from pathlib import Path, PurePosixPath
from typing import Any

from dc_ssdae.errors import MissingInputError
from dc_ssdae.weights import WEIGHTS


def fetch_model(name: str, subfolder: str | None = None, variant: str | None = None, **settings: Any) -> Path:
    """Download a model's config.json and safetensors, and nothing else; what is in the cache already is not fetched.

    Args:
        name: the model's id, OWNER/MODEL.
        subfolder: where in the repository it lies.
        variant: of the weight files, such as "fp16"; None takes those without.
        settings: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only` of
            `huggingface_hub.snapshot_download`.

    Returns:
        The folder in the cache for the model's files.

    Raises:
        MissingInputError: the hub, or the model there, is not to be had.
    """
    from huggingface_hub import snapshot_download

    weights = [".safetensors", "-*-of-*.safetensors", ".safetensors.index.json"]
    if variant is not None:
        weights = [f".{variant}*.safetensors", f"*.{variant}.safetensors", f"*.index*{variant}*.json"]
    prefix = PurePosixPath(subfolder or "")
    patterns = [str(prefix / "config.json"), *(str(prefix / f"{WEIGHTS}{ending}") for ending in weights)]
    try:
        snapshot = snapshot_download(name, allow_patterns=patterns, **settings)
    except (OSError, ValueError) as error:  # the second for names that are no ids
        told = f"{name}: no such folder, and it cannot be downloaded from the hub: {error}"
        raise MissingInputError(" ".join(told.split())) from error
    return Path(snapshot, prefix)
