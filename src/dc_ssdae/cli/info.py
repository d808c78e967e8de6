"""`dc-ssdae info`: lists the presets, and describes a preset or a saved model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dc_ssdae.cli.common import import_classes, select_device, show, table, wrapped
from dc_ssdae.cli.options import DType, ImportOptions, JsonOptions
from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.presets import SHIPPED_MODEL, list_presets, load_preset
from dc_ssdae.settings import setting

if TYPE_CHECKING:
    from dc_ssdae.autoencoder import DCSSDAE

PARTS = ("encoder", "decoder", "dynamics")
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

    program = "dc-ssdae info"
    usage = "dc-ssdae info [PRESET|DIR] [options]"
    model: str | None = setting(None, positional=True, metavar="PRESET|DIR")
    device: str | None = setting(None, metavar="DEVICE")
    dtype: DType | None = None
    groups: bool = False


def run(options: Options) -> None:
    """Print the presets, or a model's groups or profile."""
    if options.groups and options.model is None:
        raise InputError("--groups needs a model: a preset's name, or the folder of a saved model or a training run")
    if options.groups and (options.device is not None or options.dtype is not None):
        raise InputError("--groups counts parameters, which no device or dtype changes: leave --device and --dtype out")
    classes = import_classes(options.modules)
    if options.model is None:
        presets = [_preset(name) for name in list_presets()]
        rows = [("preset", "f", "c", "description"), *(tuple(map(str, entry.values())) for entry in presets)]
        show(presets, options.json, lambda: table(rows, "lrrl"))
    elif options.groups:
        from dc_ssdae.parameter_groups import group_sizes

        sizes = group_sizes(_open(options.model, classes)[0])
        # For other programs to read too: plain digits, and not wrapped to the terminal.
        show(sizes, options.json, lambda: table([(name, str(size)) for name, size in sizes.items()], "lr", width=500))
    else:
        profile = _profile(options.model, options.dtype or "float32", options.device, classes)
        show(profile, options.json, lambda: _profile_as_text(profile))


def _preset(name: str) -> dict[str, Any]:
    preset = load_preset(name)
    sizes = {key: preset["model"][key] for key in ("downsample_factor", "latent_channels")}
    return {"name": name, **sizes, "description": preset["description"]}


def _profile(name: str, dtype: str, device: str | None, classes: Sequence[type]) -> dict[str, Any]:
    import torch

    from dc_ssdae.evaluation.profile import compression_ratio, count_flops, count_parameters, latent_shape

    model, folder, weights = _open(name, classes)
    wide, state = getattr(torch, dtype), model.state_dict().values()
    total = sum(t.numel() * (wide if t.is_floating_point() else t.dtype).itemsize for t in state)
    sizes: dict[str, Any] = dict.fromkeys(map(str, SIZES))  # None where f does not divide the side
    for size in SIZES:
        if size % model.config.downsample_factor == 0:
            flops = count_flops(model, size)._asdict()
            costs = {f"{work}_flops": count for work, count in flops.items()}
            sizes[str(size)] = {"latent_shape": latent_shape(model, size, size), **costs}
    parts = {}
    for part in PARTS:
        # A setting that is None follows from the others.
        settings = {key: value for key, value in model.config[part]["init_args"].items() if value is not None}
        parts[part] = {"class_path": model.config[part]["class_path"], **settings}
    return {
        "name": name,
        "description": load_preset(name)["description"] if folder is None else "a saved model",
        "downsample_factor": model.config.downsample_factor,
        "latent_channels": model.config.latent_channels,
        "compression_ratio": compression_ratio(model),
        "parameters": count_parameters(model),
        "weights_mebibytes": total / 2**20,
        "dtype": dtype,
        "sizes": sizes,
        "seconds": None if device is None else _seconds(folder or name, dtype, device, classes),
        **parts,
        **{name: model.config[name] for name in ("shift_factor", "scaling_factor", "latents_mean", "latents_std")},
        "provenance": model.config.provenance,
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
    if not Path(name).is_dir() and name != SHIPPED_MODEL:
        if Path(name).exists():
            raise InputError(f"{name} is a file; info takes a preset's name or a saved model's folder")
        raise unknown_name("preset or folder", name, list_presets())
    folder = model_folder(name)
    model = DCSSDAE.without_weights(read_config(folder), classes)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no weights: there is no safetensors file")
    check_same_tensors(f"{folder}", model.state_dict(), read_safetensors(*files))
    return model, folder, [file.name for file in files]


def _seconds(source: str | Path, dtype: str, device: str, classes: Sequence[type]) -> dict[str, Any]:
    """Time a preset with random weights, or a folder's model, at the smallest of SIZES that is a multiple of f."""
    import torch

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.evaluation.profile import measure_seconds

    where, weights = select_device(device), getattr(torch, dtype)
    if isinstance(source, Path):
        model = DCSSDAE.from_pretrained(source, classes=classes, torch_dtype=weights).to(where)
    else:
        model = torch.nn.Module.to(DCSSDAE.from_preset(source), device=where, dtype=weights)
    factor = model.config.downsample_factor
    size = next((size for size in SIZES if size % factor == 0), factor)
    return {"device": str(where), "size": size, **measure_seconds(model, size)._asdict()}


def _profile_as_text(profile: Mapping[str, Any]) -> str:
    factor, sizes = profile["downsample_factor"], profile["sizes"]
    numbers = [
        ("downsampling factor f", f"{factor}"),
        ("latent channels c", f"{profile['latent_channels']}"),
        ("compression ratio 3 f²/c", f"{profile['compression_ratio']:g}"),
        *((f"parameters, {part}", f"{count:,}") for part, count in profile["parameters"].items()),
        (f"weights in {profile['dtype']}, MiB", f"{profile['weights_mebibytes']:,.1f}"),
    ]
    costs = [("image", *(f"{size} x {size} px" for size in sizes))]
    costs.append(("latent", *("x".join(map(str, at["latent_shape"])) if at else "-" for at in sizes.values())))
    for label, key in (("encode, GFLOPs", "encode_flops"), ("decode step, GFLOPs", "decode_step_flops")):
        costs.append((label, *(f"{at[key] / 1e9:,.2f}" if at else "-" for at in sizes.values())))
    notes = ["Convolutions and matrix products, 2 FLOPs per multiply-add."]
    padded = [size for size, at in sizes.items() if at is None]
    notes += [f"{size} px is not a multiple of f = {factor}: such an image is padded first." for size in padded]
    if seconds := profile["seconds"]:
        encode, step = (f"{1000 * seconds[name]:,.1f} ms" for name in ("encode", "decode_step"))
        notes.append(
            f"One {seconds['size']} px image on {seconds['device']}, median of 3: encode {encode}, decode step {step}."
        )
    facts = []
    for part in PARTS:
        settings = [f"{name} {value}" for name, value in profile[part].items()]
        facts.append((part, ", ".join(settings).removeprefix("class_path ")))
    if profile["latents_mean"] is not None:
        shift, scale = profile["shift_factor"], profile["scaling_factor"]
        channels = "channel by channel: latents_mean and latents_std in config.json"
        facts.append(("latent", f"shift_factor {shift:.6g}, scaling_factor {scale:.6g}; {channels}"))
    facts += _origin(profile["provenance"] or {})
    if profile["weights"]:
        facts.append(("weights", f"{', '.join(profile['weights'])}: fit the config"))
    title = wrapped(f"{profile['name']}: {profile['description']}")
    below = "\n".join([table(costs, "lrr"), *map(wrapped, notes)])
    return "\n\n".join([title, table(numbers, "lr"), below, table(facts, "ll")])


def _origin(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Describe how the model was trained and how it was evaluated, as far as that is known."""
    from dc_ssdae.provenance import Provenance

    known = Provenance.from_mapping(provenance)
    origin = "; ".join(map(" ".join, known.facts()))
    facts = [("origin", origin)] if origin else []
    for evaluation in known.evaluations or ():
        metrics = evaluation.metrics.items()
        figures = [f"{name} {metric}{' *' if metric.note else ''}" for name, metric in metrics]
        notes = [f"* {name}: {metric.note}" for name, metric in metrics if metric.note]
        facts.append(("measured", "; ".join([*map(" ".join, evaluation.facts()), *figures, *notes])))
    return facts
