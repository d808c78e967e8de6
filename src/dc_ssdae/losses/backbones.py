"""Frozen networks of other people that loss terms look through, and where their weights come from."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn

from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.weights import read_safetensors

BackbonePrecision = Literal["auto", "bfloat16", "float32"]

RANDOM = "random"
"""Setting `weights` of a term: none from disk, but random ones, the same at every start."""

FOLDER_VARIABLE = "DC_SSDAE_WEIGHTS"
"""Environment variable that names a folder of weights."""

RANDOM_SEED = 0
CONNECT_SECONDS = 10.0


class FrozenBackbone(nn.Module):
    """A network that computes features and never trains.

    It is no submodule: parameters, state dicts, optimisers and process groups do not see it. It stays in evaluation
    mode, moves with `to`, compiles with `compile` and is copied and pickled with its weights. Because no state dict
    could bring its weights back, it stays where it is when the rest goes to the meta device, and keeps its values when
    the rest comes from there with `to_empty`.

    Args:
        network: on the CPU, with its weights.
        precision: of its computation: "float32", or autocast to "bfloat16"; "auto" takes bfloat16 where it is safe and
            the device, a CUDA one, computes in it.
        bfloat16_is_safe: whether "auto" may do so.

    Raises:
        InputError: there is no such precision.
    """

    network: Any

    def __init__(self, network: nn.Module, precision: str = "auto", bfloat16_is_safe: bool = False) -> None:
        super().__init__()
        check_precision(precision)
        self.precision = precision
        self.bfloat16_is_safe = bfloat16_is_safe
        self.__dict__["network"] = network.eval().requires_grad_(False)  # plain assignment would register it

    def forward(self, x: Tensor, *args: Any) -> Any:
        """Give what the network gives for these arguments, in the precision of its computation."""
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
            raise InputError(
                f"precision of a backbone is bfloat16, which {device.type} has no autocast to; use float32"
            )
        if self.precision == "auto" and self.bfloat16_is_safe and device.type == "cuda":
            wanted = torch.cuda.is_bf16_supported(including_emulation=False)
        # Switched off rather than left out: whoever calls may be within autocast.
        return torch.autocast(device.type, torch.bfloat16, enabled=wanted) if available else nullcontext()


def check_precision(precision: str) -> None:
    """Refuse what is no precision of a backbone.

    Raises:
        InputError: lists the accepted ones.
    """
    if precision not in get_args(BackbonePrecision):
        raise unknown_name("precision of a backbone", precision, get_args(BackbonePrecision))


@dataclass(frozen=True)
class WeightsFile:
    """The file of a backbone's weights.

    Args:
        names: file names under which a folder may hold it, the preferred first.
        origin: where its library has it from, for messages.
        cached: finds it in the library's cache.
        download: brings it there.
    """

    names: tuple[str, ...]
    origin: str
    cached: Callable[[], Path | None]
    download: Callable[[], Path]


def find_weights(term: str, file: WeightsFile, weights: str | None) -> Path | None:
    """Find a backbone's weights, or download them.

    In this order: the folder `weights` and no other place, if it is given; the folder that the environment variable
    DC_SSDAE_WEIGHTS names; the library's cache; the library's download.

    Args:
        term: its name among the losses, for messages.
        file: that is wanted.
        weights: a folder, or "random".

    Returns:
        The file; None for random weights.

    Raises:
        InputError: a folder is none, or the file is not to be had; one line that says which file to put where.
    """
    if weights == RANDOM:
        return None
    setting = f"losses.{term}.init_args.weights"
    names = " or ".join(file.names)
    if weights is not None:
        found = _in_folder(setting, weights, file)
        if found is None:
            raise InputError(f"{setting} is {weights!r}, a folder without {names}; place it there, from {file.origin}")
        return found
    found = weights_on_this_machine(file)
    if found is not None:
        return found
    try:
        return file.download()
    except Exception as error:  # what the libraries raise for the network and the disk has no common base
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"losses.{term} needs {names}, which is not on this machine and could not be downloaded from {file.origin} "
            f"({reason}); place it in the folder that {setting} or the environment variable {FOLDER_VARIABLE} names, "
            f"or leave the term out with --losses.{term} 0"
        ) from None


def weights_on_this_machine(file: WeightsFile) -> Path | None:
    """Find a backbone's weights in the folder that DC_SSDAE_WEIGHTS names, or in the library's cache.

    Raises:
        InputError: the variable names something that is no folder.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    found = _in_folder(f"environment variable {FOLDER_VARIABLE}", folder, file) if folder else None
    return found or file.cached()


def hub_file(url: str) -> WeightsFile:
    """Describe a file that PyTorch Hub has at a URL and keeps in its checkpoints."""
    name = Path(urlsplit(url).path).name

    def target() -> Path:
        return Path(torch.hub.get_dir()) / "checkpoints" / name

    def cached() -> Path | None:
        return target() if target().is_file() else None

    def download() -> Path:
        # torch.hub waits minutes for a host that does not answer.
        request = Request(url, headers={"User-Agent": "torch.hub"}, method="HEAD")
        with suppress(HTTPError):  # it answers; the download itself says what is wrong
            urlopen(request, timeout=CONNECT_SECONDS).close()
        target().parent.mkdir(parents=True, exist_ok=True)
        prefix = torch.hub.HASH_REGEX.search(name)
        torch.hub.download_url_to_file(url, str(target()), hash_prefix=prefix.group(1) if prefix else None)
        return target()

    return WeightsFile((name,), url, cached, download)


def hugging_face_file(repository: str, filename: str, names: tuple[str, ...]) -> WeightsFile:
    """Describe a file of a Hugging Face repository.

    Args:
        repository: OWNER/NAME, or OWNER/NAME@REVISION.
        filename: within the repository.
        names: under which a folder may hold it.
    """
    repository, _, revision = repository.partition("@")
    place: dict[str, Any] = {"repo_id": repository, "filename": filename, "revision": revision or None}

    def cached() -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(**place)
        return Path(found) if isinstance(found, str) else None

    def download() -> Path:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        get_hf_file_metadata(hf_hub_url(**place), timeout=CONNECT_SECONDS)  # the download itself tries half a minute
        return Path(hf_hub_download(**place))

    return WeightsFile(names, f"{filename} of {repository} on the Hugging Face Hub", cached, download)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict, of safetensors or of PyTorch's own format; nothing in it is run.

    Raises:
        InputError: the file is missing, damaged or something else.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{path} is damaged, or no file of weights: {reason}") from None
    if not isinstance(tensors, Mapping):
        raise InputError(f"{path} holds a {type(tensors).__name__}; a file of weights holds tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{path} holds {name!r}, which is no tensor; a file of weights holds tensors by name")
    return dict(tensors)


def load_exactly(
    network: nn.Module, tensors: Mapping[str, Tensor], path: Path, renamed: Mapping[str, str] | None = None
) -> None:
    """Load a network's weights.

    Args:
        network: in place.
        tensors: by name.
        path: where they come from, for messages.
        renamed: the names in `tensors` by those of the network, where they differ.

    Raises:
        InputError: a tensor is missing, left over or of another shape.
    """
    renamed = renamed or {}
    expected = {renamed.get(name, name): tensor for name, tensor in network.state_dict().items()}
    problems = [f"tensor {name!r} is missing" for name in expected if name not in tensors]
    problems += [f"tensor {name!r} is left over" for name in tensors if name not in expected]
    problems += [
        f"tensor {name!r} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        raise InputError(f"{path} does not hold the weights that are wanted: {problems[0]}{more}")
    network.load_state_dict({name: tensors[renamed.get(name, name)] for name in network.state_dict()})


@contextmanager
def fixed_random_state() -> Iterator[None]:
    """Draw from one fixed seed on the CPU, and leave PyTorch's generators as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RANDOM_SEED)  # torch.manual_seed would seed the accelerators' too
        yield


def _in_folder(setting: str, folder: str, file: WeightsFile) -> Path | None:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(
            f"{setting} is {folder!r}, which is no folder; it names the one with {' or '.join(file.names)}"
        )
    return next((path / name for name in file.names if (path / name).is_file()), None)
