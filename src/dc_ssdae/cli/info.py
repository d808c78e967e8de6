"""`dc-ssdae info`: what presets there are, and what a preset or a saved model costs."""

import json
import shutil
import textwrap
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dc_ssdae.cli.common import add_dtype_option, add_import_option, import_classes, say, select_device
from dc_ssdae.cli.parser import CommandParser, device_name, filled
from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.presets import SHIPPED_MODEL, list_presets, load_preset

if TYPE_CHECKING:
    from dc_ssdae.autoencoder import DCSSDAE

SIZES = (256, 512)
"""Sides, in pixels, of the square images that models are measured at."""


def build_parser() -> CommandParser:
    """Build the command's parser."""
    parser = CommandParser(
        prog="dc-ssdae info",
        description="List the presets; or tell a model's parameters, latent shape, compression ratio and FLOPs.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=filled,
        metavar="PRESET|DIR",
        help="a preset's name, or the folder of a saved model or of a training run",
    )
    add_import_option(parser)
    parser.add_argument(
        "--device", type=device_name, help="also time encode and one decode step there: auto, cpu, cuda, cuda:N or mps"
    )
    add_dtype_option(parser, "of the weights whose memory is told, and of what is timed")
    parser.add_argument(
        "--groups",
        action="store_true",
        help="print the model's parameter groups, which a phase of training can choose, with their numbers of "
        "parameters, and nothing else",
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    return parser


def run(args: Namespace) -> int:
    """Print the presets or a model's profile; gives the exit code."""
    if args.groups and args.model is None:
        raise InputError("--groups needs a model: a preset's name, or the folder of a saved model or a training run")
    # That it is given cannot be told from the default, which says nothing about groups either.
    if args.groups and (args.device is not None or args.dtype != "float32"):
        raise InputError("--groups counts parameters, which no device or dtype changes: leave --device and --dtype out")
    classes = import_classes(args.modules)
    if args.groups:
        sizes = _group_sizes(args.model, classes)
        say(json.dumps(sizes, indent=2) if args.json else _groups_as_text(sizes))
    elif args.model is None:
        presets = _presets()
        say(json.dumps(presets, indent=2) if args.json else _list_as_text(presets))
    else:
        profile = _profile(args.model, args.dtype, args.device, classes)
        say(json.dumps(profile, indent=2) if args.json else _profile_as_text(profile))
    return 0


def _presets() -> list[dict[str, Any]]:
    listing = []
    for name in list_presets():
        preset = load_preset(name)
        sizes = {key: preset["model"][key] for key in ("downsample_factor", "latent_channels")}
        listing.append({"name": name, **sizes, "description": preset["description"]})
    return listing


def _group_sizes(name: str, classes: Sequence[type]) -> dict[str, int]:
    from dc_ssdae.parameter_groups import group_sizes

    return group_sizes(_describe(name, classes).model)


def _profile(name: str, dtype: str, device: str | None, classes: Sequence[type]) -> dict[str, Any]:
    from dc_ssdae.evaluation.profile import compression_ratio, count_parameters

    model, description, folder, weights = _describe(name, classes)
    return {
        "name": name,
        "description": description,
        "downsample_factor": model.config.downsample_factor,
        "latent_channels": model.config.latent_channels,
        "compression_ratio": compression_ratio(model),
        "parameters": count_parameters(model),
        "weights_mebibytes": _mebibytes(model, dtype),
        "dtype": dtype,
        "sizes": {str(size): _at_size(model, size) for size in SIZES},
        "seconds": None if device is None else _seconds(folder or name, dtype, device, classes),
        **{part: _settings(model.config[part]) for part in ("encoder", "decoder", "dynamics")},
        **{name: model.config[name] for name in ("shift_factor", "scaling_factor", "latents_mean", "latents_std")},
        "provenance": model.config.provenance,
        "weights": weights,
    }


class _Described(NamedTuple):
    """A model on the meta device; of a saved one also its folder and the names of its weight files."""

    model: "DCSSDAE"
    description: str
    folder: Path | None
    weights: list[str]


def _describe(name: str, classes: Sequence[type]) -> _Described:
    """Build the model of a preset or a folder without weights."""
    import torch

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.model_folder import model_folder

    if name in list_presets():
        with torch.device("meta"):
            model = DCSSDAE.from_preset(name)
        return _Described(model, load_preset(name)["description"], None, [])
    if Path(name).is_dir() or name == SHIPPED_MODEL:
        folder = model_folder(name)
        model, weights = _model_in(folder, classes)
        return _Described(model, "a saved model", folder, weights)
    if Path(name).exists():
        raise InputError(f"{name} is a file; info takes a preset's name or a saved model's folder")
    raise unknown_name("preset or folder", name, list_presets())


def _mebibytes(model: "DCSSDAE", dtype: str) -> float:
    import torch

    wide, state = getattr(torch, dtype), model.state_dict().values()
    return sum(t.numel() * (wide if t.is_floating_point() else t.dtype).itemsize for t in state) / 2**20


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


def _model_in(folder: Path, classes: Sequence[type]) -> "tuple[DCSSDAE, list[str]]":
    """Build the model of a folder without weights, and check the weight files by their headers."""
    from dc_ssdae.autoencoder import build_without_weights
    from dc_ssdae.model_folder import read_config
    from dc_ssdae.weights import check_same_tensors, read_safetensors

    model = build_without_weights(read_config(folder), classes)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no weights: there is no safetensors file")
    check_same_tensors(f"{folder}", model.state_dict(), read_safetensors(*files))
    return model, [file.name for file in files]


def _at_size(model: "DCSSDAE", size: int) -> dict[str, Any] | None:
    from dc_ssdae.evaluation.profile import count_flops, latent_shape

    if size % model.config.downsample_factor:
        return None
    flops = count_flops(model, size)
    return {
        "latent_shape": latent_shape(model, size, size),
        "encode_flops": flops.encode,
        "decode_step_flops": flops.decode_step,
    }


def _settings(part: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a part's class and settings; those that are None follow from the others."""
    settings = {name: value for name, value in part["init_args"].items() if value is not None}
    return {"class_path": part["class_path"], **settings}


def _list_as_text(presets: list[dict[str, Any]]) -> str:
    rows = [("preset", "f", "c", "description")]
    rows += [(p["name"], str(p["downsample_factor"]), str(p["latent_channels"]), p["description"]) for p in presets]
    name, factor, channels = (max(len(row[column]) for row in rows) for column in range(3))
    return "\n".join(_wrap(f"{row[0]:{name}}  {row[1]:>{factor}}  {row[2]:>{channels}}  ", row[3]) for row in rows)


def _groups_as_text(sizes: Mapping[str, int]) -> str:
    """One line a group, for other programs to read too: plain digits, and not wrapped to the terminal."""
    name, digits = (max(map(len, column), default=0) for column in (sizes, map(str, sizes.values())))
    return "\n".join(f"{group:{name}}  {size:>{digits}}" for group, size in sizes.items())


def _profile_as_text(profile: Mapping[str, Any]) -> str:
    factor, channels = profile["downsample_factor"], profile["latent_channels"]
    lines = [
        _wrap("", f"{profile['name']}: {profile['description']}"),
        "",
        f"downsampling factor  f = {factor}",
        f"latent channels      c = {channels}",
        f"compression ratio    {profile['compression_ratio']:g} (image values / latent values, 3 f²/c)",
        "",
        "parameters",
        *(f"  {part:8}  {count:>15,}" for part, count in profile["parameters"].items()),
        f"weights    {profile['weights_mebibytes']:>16,.1f} MiB in {profile['dtype']}",
        "",
        f"{'image':22}" + "".join(f"{f'{size} x {size} px':>18}" for size in profile["sizes"]),
    ]
    columns = profile["sizes"].values()
    rows = {
        "latent": [at and "x".join(map(str, at["latent_shape"])) for at in columns],
        "encode, GFLOPs": [at and f"{at['encode_flops'] / 1e9:,.2f}" for at in columns],
        "decode step, GFLOPs": [at and f"{at['decode_step_flops'] / 1e9:,.2f}" for at in columns],
    }
    lines += [f"{label:22}" + "".join(f"{cell or '-':>18}" for cell in cells) for label, cells in rows.items()]
    lines += ["Convolutions and matrix products, 2 FLOPs a multiply-add."]
    lines += [
        f"{size} px is not a multiple of f = {factor}: such an image is padded first."
        for size, at in profile["sizes"].items()
        if at is None
    ]
    if seconds := profile["seconds"]:
        encode, step = (1000 * seconds[name] for name in ("encode", "decode_step"))
        digits = 1 if max(encode, step) < 1000 else 0  # the line fits a terminal on slow machines, too
        lines.append(
            f"One {seconds['size']} px image on {seconds['device']}, median of 3: encode "
            f"{encode:,.{digits}f} ms, decode step {step:,.{digits}f} ms."
        )
    lines.append("")
    for part in ("encoder", "decoder", "dynamics"):
        settings = dict(profile[part])
        class_name = settings.pop("class_path")
        lines.append(_wrap(f"{part:10}", ", ".join([class_name, *(f"{k} {v}" for k, v in settings.items())])))
    if profile["latents_mean"] is not None:
        shift, scale = profile["shift_factor"], profile["scaling_factor"]
        channels = "; channel by channel: latents_mean and latents_std in config.json"
        lines.append(_wrap(f"{'latent':10}", f"shift_factor {shift:.6g}, scaling_factor {scale:.6g}{channels}"))
    lines += _provenance_as_text(profile["provenance"] or {})
    if profile["weights"]:
        lines.append(_wrap(f"{'weights':10}", f"{', '.join(profile['weights'])}: fit the config"))
    return "\n".join(lines)


def _provenance_as_text(provenance: Mapping[str, Any]) -> list[str]:
    """Where the model comes from and what it measures, where that is known."""
    from dc_ssdae.provenance import TITLES, Provenance

    known = Provenance.from_mapping(provenance)
    origin = "; ".join(f"{what} {how}" for what, how in known.training_lines())
    lines = [_wrap(f"{'origin':10}", origin)] if origin else []
    for evaluation in known.evaluations or ():
        metrics = evaluation.metrics.items()
        figures = [f"{TITLES.get(name, name)} {metric}{' *' if metric.note else ''}" for name, metric in metrics]
        notes = [f"* {name}: {metric.note}" for name, metric in metrics if metric.note]
        lines.append(_wrap(f"{'measured':10}", "; ".join([evaluation.title(), *figures, *notes])))
    return lines


def _wrap(label: str, text: str) -> str:
    """Wrap text to the terminal, beside a label."""
    width = max(shutil.get_terminal_size().columns, len(label) + 20)
    return textwrap.fill(text, width, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False)
