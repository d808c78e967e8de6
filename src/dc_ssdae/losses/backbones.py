"""Frozen networks by other authors that loss terms compute features with, and where their weights come from."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import huggingface_hub
import torch
from torch import Tensor, nn

from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.weights import check_same_tensors, read_safetensors

PRECISIONS = ("auto", "bfloat16", "float32")

RANDOM = "random"
"""Value of a term's setting `weights` that takes random weights, the same at every start, instead of a file."""

FOLDER_VARIABLE = "DC_SSDAE_WEIGHTS"
"""Environment variable that names a folder of weights."""

RANDOM_SEED = 0
CONNECT_SECONDS = 10.0


class FrozenBackbone(nn.Module):
    """A network that computes features and never trains.

    The network is not registered as a submodule: parameters, state dicts, optimisers and process groups do not see it.
    It stays in evaluation mode, follows `to`, is compiled in place by `compile`, and is copied and pickled with its
    weights. No state dict could bring its weights back, so it ignores `to("meta")` and keeps its values in `to_empty`.

    Args:
        network: on the CPU, with its weights.
        precision: "float32", or "bfloat16" by autocast; "auto" takes bfloat16 where that is safe and the device is a
            CUDA one that computes in it.
        bfloat16_is_safe: whether "auto" may take bfloat16.

    Raises:
        InputError: the precision is unknown.
    """

    network: Any

    def __init__(self, network: nn.Module, precision: str = "auto", bfloat16_is_safe: bool = False) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise unknown_name("precision of a backbone", precision, PRECISIONS)
        self.precision = precision
        self.bfloat16_is_safe = bfloat16_is_safe
        self.__dict__["network"] = network.eval().requires_grad_(False)  # plain assignment would register it

    def forward(self, x: Tensor, *args: Any) -> Any:
        """Call the network with `x`, in the dtype of its weights, and `args`."""
        with self._autocast(x.device):
            return self.network(x.to(next(self.network.parameters()).dtype), *args)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network in place, as `nn.Module.compile` does."""
        self.network.compile(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenBackbone":
        def with_values(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.is_meta:
                return tensor
            return result if result is tensor else result.copy_(tensor)  # `to_empty` leaves values behind

        super()._apply(fn, recurse)
        if recurse:
            self.network._apply(with_values)
        return self

    def _autocast(self, device: torch.device) -> AbstractContextManager[None]:
        available = torch.amp.is_autocast_available(device.type)
        wanted = self.precision == "bfloat16"
        if wanted and not available:
            raise InputError(f"a backbone's precision is bfloat16, but {device.type} has no autocast; use float32")
        if self.precision == "auto" and self.bfloat16_is_safe and device.type == "cuda":
            wanted = torch.cuda.is_bf16_supported(including_emulation=False)
        # Switched off rather than left out: whoever calls may be within autocast.
        return torch.autocast(device.type, torch.bfloat16, enabled=wanted) if available else nullcontext()


@dataclass(frozen=True)
class WeightsFile:
    """A file with a backbone's published weights.

    Args:
        names: file names that a folder may hold it under, the preferred one first.
        origin: where the weights' authors publish it, for messages.
        cached: finds the file in its library's cache.
        download: downloads it into that cache.
    """

    names: tuple[str, ...]
    origin: str
    cached: Callable[[], Path | None]
    download: Callable[[], Path]


def hub_file(url: str) -> WeightsFile:
    """Describe a file that PyTorch Hub downloads from a URL and keeps among its checkpoints."""
    name = Path(urlsplit(url).path).name

    def cached() -> Path | None:
        path = Path(torch.hub.get_dir(), "checkpoints", name)
        return path if path.is_file() else None

    def download() -> Path:
        # PyTorch Hub itself would wait for minutes for a host that does not answer.
        urlopen(Request(url, headers={"User-Agent": "torch.hub"}), timeout=CONNECT_SECONDS).close()
        with redirect_stdout(sys.stderr):
            torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        return Path(torch.hub.get_dir(), "checkpoints", name)

    return WeightsFile((name,), url, cached, download)


def hugging_face_file(repository: str, names: tuple[str, ...]) -> WeightsFile:
    """Describe the model.safetensors of a Hugging Face repository.

    Args:
        repository: OWNER/NAME.
        names: file names that a folder may hold it under.
    """
    filename = "model.safetensors"

    def cached() -> Path | None:
        found = huggingface_hub.try_to_load_from_cache(repository, filename)
        return Path(found) if isinstance(found, str) else None

    def download() -> Path:
        # The download itself would retry for a minute if the host does not answer.
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, filename), timeout=CONNECT_SECONDS)
        return Path(huggingface_hub.hf_hub_download(repository, filename))

    return WeightsFile(names, f"{filename} of {repository} on the Hugging Face Hub", cached, download)


def find_weights(term: str, file: WeightsFile, weights: str | None) -> Path | None:
    """Find the weights of a loss term's backbone, or download them.

    If `weights` names a folder, only that folder is searched. Otherwise the search goes through the folder that the
    environment variable DC_SSDAE_WEIGHTS names and the library's cache, and ends with a download.

    Args:
        term: the term's name among the losses, for messages.
        file: the file that is wanted.
        weights: a folder, "random", or None.

    Returns:
        The file's path; None for random weights.

    Raises:
        InputError: the folder does not exist, or the file is not found and cannot be downloaded; the message says
            which file is wanted, where it is published and where to put it.
    """
    if weights == RANDOM:
        return None
    setting = f"losses.{term}.init_args.weights"
    if weights is None:
        otherwise = f"name its folder by {setting}, or leave the term out with --losses.{term} 0"
        return weights_on_this_machine(file) or download_weights(file, f"losses.{term}", otherwise)
    found = _in_folder(setting, weights, file)
    if found is None:
        names = " or ".join(file.names)
        raise InputError(f"{setting} is {weights!r}, a folder without {names}; place it there, from {file.origin}")
    return found


def weights_on_this_machine(file: WeightsFile) -> Path | None:
    """Find a backbone's weights in the folder that DC_SSDAE_WEIGHTS names, or in their library's cache.

    Raises:
        InputError: the variable does not name a folder.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    found = _in_folder(f"environment variable {FOLDER_VARIABLE}", folder, file) if folder else None
    return found or file.cached()


def download_weights(file: WeightsFile, needed_by: str, otherwise: str) -> Path:
    """Download a backbone's weights into their library's cache.

    Args:
        file: the file that is wanted.
        needed_by: what needs it, for messages.
        otherwise: what to do if it cannot be had, for messages.

    Raises:
        InputError: the download failed.
    """
    try:
        return file.download()
    except Exception as error:  # the libraries' errors for networks and disks have no common base
        raise InputError(
            f"{needed_by} needs {' or '.join(file.names)}, which is not on this machine and could not be downloaded "
            f"from {file.origin} ({_in_one_line(error)}); place it in the folder that the environment variable "
            f"{FOLDER_VARIABLE} names, or {otherwise}"
        ) from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict in safetensors' or PyTorch's own format; no code in the file is run.

    Raises:
        InputError: the file is missing, damaged, or does not hold a state dict.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{path} is damaged, or not a file of weights: {_in_one_line(error)}") from None
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"{path} is not a file of weights, which holds tensors by name")
    return {str(name): tensor for name, tensor in tensors.items()}


def load_exactly(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load a network's weights in place; `path`, where they come from, is for messages.

    Raises:
        InputError: a tensor is missing, left over, or of another shape or type.
    """
    check_same_tensors(str(path), network.state_dict(), tensors)
    network.load_state_dict(tensors)


@contextmanager
def fixed_random_state() -> Iterator[None]:
    """Draw from one fixed seed on the CPU, and leave PyTorch's generators as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_SEED)  # torch.manual_seed would seed the accelerators' too
        yield


def _in_folder(setting: str, folder: str, file: WeightsFile) -> Path | None:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(f"{setting} is {folder!r}, which is not a folder; name the one with {' or '.join(file.names)}")
    return next((path / name for name in file.names if (path / name).is_file()), None)


def _in_one_line(error: Exception) -> str:
    return shorten(str(error) or type(error).__name__, 300, placeholder=" …")
