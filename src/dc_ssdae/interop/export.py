"""Export: encoder and one-step decoder as programs that need neither this package nor, with ONNX, Python."""

import contextlib
import importlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dc_ssdae import __version__
from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.components import COMPONENTS
from dc_ssdae.decoding import default_noise
from dc_ssdae.dynamics import Dynamics
from dc_ssdae.dynamics.corruption import predict
from dc_ssdae.errors import InputError, check_names
from dc_ssdae.files import folder_beside, naming
from dc_ssdae.model_folder import NOT_MEASURED
from dc_ssdae.networks.attention import DENSE_TOKENS

Format = Literal["pt2", "onnx"]

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest difference from the model that an export may have, against the largest value, or 1 where that is less."""

MANIFEST = "export.json"
NOISE_FILE = "noise.safetensors"

SMALLEST_SIDE = 2
"""In latents, of a program for any size: torch.export takes a side of 1 for a constant."""

Shape = list[int | str]
"""Of a tensor in a program: numbers, and words such as batch, h and 8*h for sides that vary."""


class ExportedPart(NamedTuple):
    """An exported encoder or decoder.

    Args:
        file: its name in the folder.
        inputs: by name, in order, the shape.
        outputs: likewise.
        largest_difference: from the model on random input, against the largest value, or 1 where that is less.
    """

    file: str
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    largest_difference: float


class Export(NamedTuple):
    """What `export_model` wrote: its parts, and the names of all files."""

    encoder: ExportedPart
    decoder: ExportedPart
    files: list[str]


def export_model(
    model: DCSSDAE,
    out: Path,
    format: Format = "pt2",
    size: tuple[int, int] | None = None,
    bake_noise: bool = False,
    noise_size: int = 1024,
    overwrite: bool = False,
) -> Export:
    """Write a model's encoder and one-step decoder as programs, and compare what was written with the model.

    The encoder takes x (B, 3, H, W) in [-1, 1] and gives mean and, where the encoder has one, logvar (B, c, h, w). The
    decoder takes z (B, c, h, w) and noise (B, 3, H, W) and gives the image (B, 3, H, W) of `decode(z, noise=noise)`.

    Args:
        model: on the device that pt2 programs are to run on, or of float32 on the CPU for ONNX; it is put in eval mode.
        out: folder to make, absent or empty; it is written whole or not at all.
        format: "pt2", which `torch.export.load` and AOTInductor read, or "onnx".
        size: H and W in pixels, multiples of f, to fix; None leaves them open, from 2 f on.
        bake_noise: put the default noise of `decode` into the decoder, which then takes z alone.
        noise_size: side in pixels of the largest square image that the default noise is kept for, where no size is
            fixed; other images may have as many pixels.
        overwrite: write into a folder that is there, and replace its files of the same names one by one.

    Raises:
        InputError: the model, or a setting, cannot be exported, or a package is missing; or a program differs from the
            model by more than `TOLERANCES`.
        OSError: the folder cannot be written.
    """
    config, factor = model.config, model.config.downsample_factor
    check_names("format", [format], get_args(Format))
    if getattr(model.dynamics, "explicit_energy", None):
        raise InputError("no exported program takes the gradient of an explicit energy, which is this model's field")
    lacking = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if format == "onnx" and lacking:
        raise InputError(f"ONNX needs {lacking[0]}: pip install 'dc-ssdae[onnx]'")
    smallest = 1 if size else SMALLEST_SIDE
    if bake_noise and not size:
        smallest = max(_sides_for_any_size(factor))  # tracing takes as much noise from the program as its images have
    for side in size or (noise_size,):
        if side < factor * smallest or side % factor:
            raise InputError(f"{side} pixels: sides are multiples of f = {factor}, from {factor * smallest} on")
    if out.exists() and not (out.is_dir() and (overwrite or not any(out.iterdir()))):
        raise InputError(f"{out} exists and is not an empty folder; name a new one")
    noise = default_noise(*(size or (noise_size, noise_size))).flatten()
    manifest: dict[str, Any] = {
        "format": "dc-ssdae export",
        "format_version": 1,
        "dc_ssdae_version": __version__,
        "torch_version": str(torch.__version__),
        "latent_channels": config.latent_channels,
        "downsample_factor": config.downsample_factor,
        **{name: config[name] for name in NOT_MEASURED},
        "dynamics": dict(config.dynamics),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "image_range": [-1, 1],
        "ranges": {"batch": {"min": 1}, **({} if size else {key: {"min": SMALLEST_SIDE} for key in "hw"})},
        "default_noise": {"pixels": noise.numel() // 3, **({} if bake_noise else {"file": NOISE_FILE})},
    }
    image: Shape = ["batch", 3, *(size or (f"{factor}*h", f"{factor}*w"))]
    latent: Shape = ["batch", config.latent_channels, *([side // factor for side in size] if size else ("h", "w"))]
    with folder_beside(out) as beside:
        exporter = _Exporter(model, beside, format, size, noise, manifest)
        inputs = {"z": latent} if bake_noise else {"z": latent, "noise": image}
        decoder = _Decoder(model, noise if bake_noise else None)
        parts = {
            "encoder": exporter.export("encoder", _Encoder(model), {"x": image}, ("mean", "logvar"), latent),
            "decoder": exporter.export("decoder", decoder, inputs, ("image",), image),
        }
        if not bake_noise:
            # Not save_file, whose files only their owner can read.
            (beside / NOISE_FILE).write_bytes(save({"noise": noise}, {"dc_ssdae_version": __version__}))
        manifest |= {name: part._asdict() for name, part in parts.items()}
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        files = sorted(path.name for path in beside.iterdir())
        if overwrite and out.is_dir():
            for name in files:
                os.replace(beside / name, out / name)
        else:
            beside.rename(out)  # which may be an empty folder
    return Export(**parts, files=files)


class _Encoder(nn.Module):
    """x (B, 3, H, W) in [-1, 1] -> mean and, where there is one, logvar: (B, c, h, w)."""

    def __init__(self, model: DCSSDAE) -> None:
        super().__init__()
        self.network = model.encoder
        self.factor = model.config.downsample_factor

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # Told one by one, because from "divisible by 8" PyTorch does not conclude "divisible by 4".
        for halving in range(1, self.factor.bit_length()):
            for side in x.shape[2:]:
                torch._check(side % 2**halving == 0)
        return self.network(x).moments


class _Decoder(nn.Module):
    """z (B, c, h, w), noise (B, 3, H, W) float32 -> images (B, 3, H, W) in z's dtype, in one step.

    Args:
        model: whose decoder it is.
        noise: the default noise of `decode`, (n,), where the decoder is to take z alone.
    """

    noise: Tensor

    def __init__(self, model: DCSSDAE, noise: Tensor | None) -> None:
        super().__init__()
        self.network = model.decoder
        self.dynamics: Dynamics = model.dynamics
        self.factor = model.config.downsample_factor
        self.register_buffer("noise", None if noise is None else noise.to(model.device))

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            height, width = z.shape[2] * self.factor, z.shape[3] * self.factor
            noise = self.noise.narrow(0, 0, 3 * height * width).view(1, 3, height, width).expand(z.shape[0], -1, -1, -1)
        level = torch.full((z.shape[0],), self.dynamics.noise_level, device=z.device)
        time = level if self.dynamics.conditions_on_time else None
        prediction = predict(self.dynamics, lambda y: self.network(y.to(z.dtype), z, time).float(), noise)
        return self.dynamics.clean_estimate(noise, prediction.float(), level).to(z.dtype)


@dataclass(frozen=True)
class _Exporter:
    """Writes parts of a model into a folder, each checked; the first fields are `export_model`'s arguments."""

    model: DCSSDAE
    folder: Path
    format: Format
    size: tuple[int, int] | None
    noise: Tensor
    manifest: dict[str, Any]

    @torch.no_grad()
    def export(
        self, part: str, module: nn.Module, inputs: dict[str, Shape], names: Sequence[str], shape: Shape
    ) -> ExportedPart:
        """Trace and write a part, load what was written, and compare it with the model.

        Args:
            part: "encoder" or "decoder".
            module: the part, as it is exported.
            inputs: by name, in order.
            names: of the outputs, of which an encoder may lack the last.
            shape: of every output.
        """
        path = self.folder / f"{part}.{self.format}"
        kind = str(self.model.config[part]["class_path"])
        factor = self.model.config.downsample_factor
        traced = (self.size[0] // factor, self.size[1] // factor) if self.size else _sides_for_any_size(factor)
        sizes = [(1, *traced), (2, *traced)] if self.size else [(1, *traced), (3, 3, 2), (1, 2, 2)]
        sizes = [(batch, h, w) for batch, h, w in sizes if 3 * h * w * factor**2 <= self.noise.numel()]
        hint = "" if self.size else "; with a fixed size it may be"
        with _exporting(f"the {part} {kind} cannot be exported{hint}"):
            example, free = self._values(inputs, 2, *traced), self._dynamic_shapes(inputs)
            program = torch.export.export(
                module.eval(), example, dynamic_shapes=free, prefer_deferred_runtime_asserts_over_guards=True
            )
            if kind in COMPONENTS[part]:
                _drop_shape_assertions(program)
            outputs = {name: shape for name, _ in zip(names, program.graph_signature.user_outputs, strict=False)}
            self._write(program, path, inputs, outputs)
            run = self._load(path)
            given = [self._values(inputs, *size) for size in sizes]
            differences = [_difference(run(*values), self._expected(part, *values)) for values in given]
        difference = float(torch.stack(differences).max())
        if not difference <= TOLERANCES.get(self.model.dtype, 1e-4):
            raise InputError(f"the exported {part} {kind} differs by {difference:.2g} from the model")
        return ExportedPart(path.name, inputs, outputs, difference)

    def _values(self, inputs: dict[str, Shape], *sizes: int) -> tuple[Tensor, ...]:
        """Random inputs for a batch of latents of these sizes; for one image alone, the default noise."""
        generator, values = torch.Generator().manual_seed(0), []
        sides = self._sides(*sizes)
        for name, shape in inputs.items():
            value = torch.randn([sides.get(side, side) for side in shape], generator=generator).clamp(-1.0, 1.0)
            if name == "noise" and len(value) == 1:
                value = self.noise[: value.numel()].view(value.shape)
            values.append(value.to(self.model.device, torch.float32 if name == "noise" else self.model.dtype))
        return tuple(values)

    def _dynamic_shapes(self, inputs: dict[str, Shape]) -> tuple[dict[int, Any], ...]:
        dims = self._sides(Dim("batch", min=1), Dim("h", min=SMALLEST_SIDE), Dim("w", min=SMALLEST_SIDE))
        return tuple({axis: dims[side] for axis, side in enumerate(shape) if side in dims} for shape in inputs.values())

    def _sides(self, batch: Any, height: Any, width: Any) -> dict[Any, Any]:
        """What the words in shapes stand for, in a batch of latents of these sizes."""
        factor = self.model.config.downsample_factor
        return {"batch": batch, "h": height, "w": width, f"{factor}*h": factor * height, f"{factor}*w": factor * width}

    def _expected(self, part: str, given: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """What the model gives; for one image alone without being told the noise, which is checked so."""
        if part == "encoder":
            return self.model.encode(given).latent_dist.moments
        return (self.model.decode(given, noise=None if len(given) == 1 else noise).sample,)

    def _write(self, program: ExportedProgram, path: Path, inputs: dict[str, Shape], outputs: dict[str, Shape]) -> None:
        if self.format == "pt2":
            content = io.BytesIO()  # PyTorch's writer of files aborts the process where a disk is full
            torch.export.save(program, content, extra_files={MANIFEST: json.dumps(self.manifest)})
            with naming(path):
                path.write_bytes(content.getbuffer())
            return
        free = self._dynamic_shapes(inputs)
        written: Any = torch.onnx.export(program, dynamo=True, verbose=False, external_data=False, dynamic_shapes=free)
        graph = written.model.graph
        for tensor in (tensor for node in graph for tensor in node.outputs if tensor.name in (*inputs, *outputs)):
            tensor.name = f"{tensor.name}_within"  # such as a mean inside of a norm
        described = [*inputs.items(), *outputs.items()]
        for tensor, (name, shape) in zip((*graph.inputs, *graph.outputs), described, strict=True):
            tensor.name = name
            for axis, side in enumerate(shape):
                tensor.shape[axis] = side
        written.model.metadata_props.update({key: json.dumps(value) for key, value in self.manifest.items()})
        with naming(path):
            written.save(path)  # with the tensors in a file beside it where they are too large for one

    def _load(self, path: Path) -> Callable[..., Any]:
        """A function of a written file's inputs, run by what will run it elsewhere."""
        if self.format == "pt2":
            return torch.export.load(path).module()
        session = importlib.import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        return lambda *values: session.run(None, dict(zip(names, map(Tensor.numpy, values), strict=True)))


def _sides_for_any_size(factor: int) -> tuple[int, int]:
    """Sides in latents with which tracing meets the forms of attention that hold for all sizes.

    Attention has two equal forms, for few tokens and for many; that for many has memory that grows linearly. Nothing is
    computed at that size.
    """
    height = 6  # more tokens than linear attention's heads are wide, which has two forms as well
    while height * (height + 1) * (factor // 8) ** 2 <= DENSE_TOKENS:
        height += 1
    return height, height + 1


def _drop_shape_assertions(program: ExportedProgram) -> None:
    """Drop what an exported program of this package's own networks asserts of its shapes, but for its inputs'.

    PyTorch asserts what it took for granted while tracing: that no size is 1, that sizes are not equal by chance, or
    which of two forms of attention was taken. All of these forms are equal; kept, they would refuse sizes that the
    program gets right, as the comparison shows. Classes of users' own may do different things at different sizes.
    """
    graph = program.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
        graph.erase_node(node)
    program.graph_module.recompile()


def _difference(answers: Any, expected: Sequence[Tensor]) -> Tensor:
    """The largest difference, against the largest expected value, or 1; NaN where something is not finite."""
    answers = [torch.as_tensor(answer) for answer in ([answers] if isinstance(answers, Tensor) else answers)]
    if [answer.shape for answer in answers] != [wanted.shape for wanted in expected]:
        return torch.tensor(float("inf"))
    pairs = [(answer.float(), wanted.float()) for answer, wanted in zip(answers, expected, strict=True)]
    return torch.stack([(a - b).abs().max() / b.abs().max().clamp(min=1.0) for a, b in pairs]).max()


@contextlib.contextmanager
def _exporting(problem: str) -> Iterator[None]:
    """Keep the exporters' chatter off the terminal, and turn whatever they raise into an `InputError` of one line."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise InputError(f"{problem}: {type(error).__name__}: {reason}") from error
    finally:
        logging.disable(logging.NOTSET)
