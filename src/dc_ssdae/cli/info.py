"""`dc-ssdae info`: lists the presets, and describes a preset or a saved model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import import_classes, select_device, show, table
from dc_ssdae.cli.options import DType, ImportOptions, JsonOptions
from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.figures import cells
from dc_ssdae.presets import list_presets, load_preset
from dc_ssdae.settings import setting

if TYPE_CHECKING:
    from dc_ssdae.autoencoder import DCSSDAE

SIZES = (256, 512)
"""Sides, in pixels, of the square images for which costs are computed."""


@dataclass(kw_only=True)
class Options(ImportOptions, JsonOptions):
    """List the presets, or describe a model: parameters, latent shape, compression ratio and FLOPs.

    Args:
        model: name of a preset, or folder of a saved model or of a training run; by default all presets are listed.
        device: also time encoding and one decoding step on this device: auto, cpu, cuda, cuda:N or mps.
        dtype: dtype for which the memory of the weights is given, and in which times are measured; by default float32.
        groups: print only the names and sizes of the model's parameter groups, which training.train can choose from.
    """

    model: str | None = setting(None, positional=True, metavar="PRESET|DIR")
    device: str | None = setting(None, metavar="DEVICE")
    dtype: DType | None = None
    groups: bool = False


def run(options: Options) -> None:
    """Print the presets, or a model's groups or profile."""
    if options.groups and (options.model is None or options.given("device", "dtype")):
        raise InputError("--groups counts the parameters of a PRESET|DIR; leave --device and --dtype out")
    classes = import_classes(options.modules)
    if options.model is None:
        presets = [{"name": name, **_preset(name)} for name in list_presets()]
        rows = [("preset", "f", "c", "description"), *(tuple(map(str, entry.values())) for entry in presets)]
        show(presets, options.json, lambda: table(rows, "lrrl"))
    elif options.groups:
        from dc_ssdae.parameter_groups import group_sizes

        sizes = group_sizes(_open(options.model, classes)[0])
        # For other programs to read too: plain digits, and not wrapped to the terminal.
        show(sizes, options.json, lambda: table([(name, str(size)) for name, size in sizes.items()], "lr", width=500))
    else:
        profile = _profile(options, options.model, classes)
        show(profile, options.json, lambda: table(_as_rows(profile), "ll"))


def _preset(name: str) -> dict[str, Any]:
    preset = load_preset(name)
    sizes = {key: preset["model"][key] for key in ("downsample_factor", "latent_channels")}
    return {**sizes, "description": preset["description"]}


def _profile(options: Options, name: str, classes: Sequence[type]) -> dict[str, Any]:
    import torch

    from dc_ssdae.components import COMPONENTS
    from dc_ssdae.evaluation.profile import compression_ratio, count_flops, count_parameters, latent_shape

    model, folder, weights = _open(name, classes)
    config, dtype = model.config, options.dtype or "float32"
    wide, state = getattr(torch, dtype), model.state_dict().values()
    total = sum(t.numel() * (wide if t.is_floating_point() else t.dtype).itemsize for t in state)
    sizes: dict[str, Any] = dict.fromkeys(map(str, SIZES))  # None where f does not divide the side
    for size in SIZES:
        if size % config.downsample_factor == 0:
            flops = {f"{work}_flops": count for work, count in count_flops(model, size)._asdict().items()}
            sizes[str(size)] = {"latent_shape": latent_shape(model, size, size), **flops}
    parts = {part: {"class_path": config[part]["class_path"], **config[part]["init_args"]} for part in COMPONENTS}
    names = ("downsample_factor", "latent_channels", "shift_factor", "scaling_factor", "latents_mean", "latents_std")
    return {
        "name": name,
        "description": load_preset(name)["description"] if folder is None else "a saved model",
        **{key: config[key] for key in (*names, "provenance")},
        "compression_ratio": compression_ratio(model),
        "parameters": count_parameters(model),
        "dtype": dtype,
        "weights_mebibytes": total / 2**20,
        "sizes": sizes,
        "seconds": options.device and _seconds(folder or name, dtype, options.device, classes),
        **parts,
        "weights": weights,
    }


def _open(name: str, classes: Sequence[type]) -> "tuple[DCSSDAE, Path | None, list[str]]":
    """Build the model of a preset or folder on the meta device; also gives the folder and its weight files.

    Raises:
        InputError: there is no such preset or model, or the weights do not fit it by their headers.
    """
    import torch

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.model_folder import model_folder, read_config
    from dc_ssdae.weights import check_same_tensors, read_safetensors

    if name in list_presets():
        with torch.device("meta"):
            return DCSSDAE.from_preset(name), None, []
    folder = model_folder(name)
    if not folder.is_dir():
        raise unknown_name("preset or folder", name, list_presets())
    model = DCSSDAE.without_weights(read_config(folder), classes)
    files = sorted(folder.glob("*.safetensors"))
    check_same_tensors(f"{folder}", model.state_dict(), read_safetensors(*files))
    return model, folder, [file.name for file in files]


def _seconds(source: str | Path, dtype: str, device: str, classes: Sequence[type]) -> dict[str, Any]:
    """Time a preset with random weights, or a folder's model, at the smaller of SIZES, or f where that is larger."""
    import torch

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.evaluation.profile import measure_seconds

    build = DCSSDAE.from_preset if isinstance(source, str) else DCSSDAE.from_pretrained
    model = build(source, classes=classes)
    # Not model.to, with which diffusers warns of modules to be kept in float32, of which there are none.
    torch.nn.Module.to(model, device=select_device(device), dtype=getattr(torch, dtype))
    size = max(SIZES[0], model.config.downsample_factor)  # both are powers of two
    return {"device": str(model.device), "size": size, **measure_seconds(model, size)}


def _as_rows(profile: dict[str, Any]) -> list[tuple[str, str]]:
    """Label what is known of a model, a row each."""
    from dc_ssdae.provenance import Provenance

    known = Provenance.from_mapping(profile.pop("provenance") or {})
    profile |= known.facts()
    for number, evaluation in enumerate(known.evaluations or (), 1):
        figures = [f"{name} {metric} {metric.note or ''}".strip() for name, metric in evaluation.metrics.items()]
        profile[f"evaluation {number}"] = "; ".join([*map(" ".join, evaluation.facts()), *figures])
    return list(cells(profile).items())
