"""Export: encoder and one-step decoder as programs that need neither this package nor, with ONNX, Python."""

import contextlib
import importlib
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

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
from dc_ssdae.errors import InputError, unknown_name
from dc_ssdae.files import folder_beside, naming
from dc_ssdae.model_folder import NOT_MEASURED
from dc_ssdae.networks.attention import DENSE_TOKENS

Format = Literal["pt2", "onnx"]

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest difference from the model that an export may have, against the largest value, or 1 where that is less."""

MANIFEST = "export.json"
NOISE_FILE = "noise.safetensors"
DEFAULT_NOISE_SIZE = 1024

SMALLEST_SIDE = 2
"""In latents, of a program for any size: torch.export takes a side of 1 for a constant."""

LARGEST_ONNX_BYTES = 1_900_000_000
"""Of tensors inside of an ONNX file, which protobuf limits to 2 GiB; larger ones lie in a file beside it."""


@dataclass(frozen=True)
class ExportedPart:
    """An exported encoder or decoder.

    Args:
        file: its name in the folder.
        inputs: by name, in order, the shape: numbers, and words such as batch, h and 8*h for sides that vary.
        outputs: likewise.
        largest_difference: from the model on random input, against the largest value, or 1 where that is less.
    """

    file: str
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    largest_difference: float


@dataclass(frozen=True)
class Export:
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
    noise_size: int = DEFAULT_NOISE_SIZE,
    overwrite: bool = False,
) -> Export:
    """Write a model's encoder and one-step decoder as programs, and compare what was written with the model.

    The encoder takes x (B, 3, H, W) in [-1, 1] and gives mean and, where the encoder has one, logvar (B, c, h, w). The
    decoder takes z (B, c, h, w) and noise (B, 3, H, W) and gives the image (B, 3, H, W) of `decode(z, noise=noise)`.

    Args:
        model: in eval mode, on the device that pt2 programs are to run on; on the CPU for ONNX.
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
    _check_settings(model, format, size, noise_size, bake_noise)
    _check_folder(out, overwrite)
    packages = _import_onnx_packages() if format == "onnx" else {}
    height, width = size or (noise_size, noise_size)
    noise = default_noise(height, width).flatten()
    with folder_beside(out) as beside:
        exporter = _Exporter(model, beside, format, size, noise, bake_noise, packages)
        parts = {"encoder": exporter.encoder(), "decoder": exporter.decoder()}
        if not bake_noise:
            # Not save_file, whose files only their owner can read.
            (beside / NOISE_FILE).write_bytes(save({"noise": noise}, {"dc_ssdae_version": __version__}))
        manifest = {**_describe_model(model), **exporter.describe(), **{name: asdict(p) for name, p in parts.items()}}
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        files = sorted(path.name for path in beside.iterdir())
        if overwrite and out.is_dir():
            for name in files:
                os.replace(beside / name, out / name)
        else:
            beside.rename(out)  # which may be an empty folder
    return Export(**parts, files=files)


def _check_folder(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something."""
    if overwrite and out.is_dir():
        return
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise InputError(f"{out} exists and is not an empty folder; name a new one")


def _check_settings(
    model: DCSSDAE, format: str, size: tuple[int, int] | None, noise_size: int, bake_noise: bool
) -> None:
    factor = model.config.downsample_factor
    if format not in get_args(Format):
        raise unknown_name("format", format, get_args(Format))
    sides = {"noise_size": noise_size} if size is None else {"height": size[0], "width": size[1]}
    smallest = factor
    if size is None:
        # Tracing takes as much noise from the program as its images have.
        smallest *= max(_sides_for_any_size(factor)) if bake_noise else SMALLEST_SIDE
    for name, side in sides.items():
        if side < smallest or side % factor:
            raise InputError(f"{name} is {side} pixels; it must be a multiple of f = {factor}, from {smallest} on")
    if energy := getattr(model.dynamics, "explicit_energy", None):
        raise InputError(
            f"this model's field is the gradient of an explicit energy ({energy}): a decode differentiates, which no "
            "exported program can"
        )
    if model.training:
        raise InputError("the model is in training mode; call model.eval() before it is exported")
    if model.use_tiling or model.use_slicing:
        raise InputError("tiling or slicing is on; call model.disable_tiling() and model.disable_slicing() first")
    if model.dtype not in TOLERANCES:
        raise InputError(f"the model is {_name(model.dtype)}; float32, float16 and bfloat16 can be exported")
    if format == "onnx" and (model.dtype != torch.float32 or model.device.type != "cpu"):
        raise InputError(
            f"the model is {_name(model.dtype)} on {model.device}; ONNX is written from float32 on the CPU, and is "
            "made half precision by ONNX's own tools"
        )


def _import_onnx_packages() -> dict[str, Any]:
    """Import what writes, reads and runs ONNX files."""
    try:
        return {name: importlib.import_module(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    except ImportError as error:
        raise InputError(
            f"ONNX needs onnx, onnxscript and onnxruntime: pip install 'dc-ssdae[onnx]' ({error})"
        ) from error


def _describe_model(model: DCSSDAE) -> dict[str, Any]:
    config = model.config
    return {
        "format": "dc-ssdae export",
        "format_version": 1,
        "dc_ssdae_version": __version__,
        "torch_version": str(torch.__version__),
        "latent_channels": config.latent_channels,
        "downsample_factor": config.downsample_factor,
        **{name: config[name] for name in NOT_MEASURED},
        "dynamics": dict(config.dynamics),
        "dtype": _name(model.dtype),
        "device": model.device.type,
        "image_range": [-1, 1],
    }


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
        posterior = self.network(x)
        return (posterior.mean,) if posterior.logvar is None else (posterior.mean, posterior.logvar)


class _Decoder(nn.Module):
    """z (B, c, h, w), noise (B, 3, H, W) float32 -> images (B, 3, H, W) in z's dtype, in one step."""

    def __init__(self, model: DCSSDAE) -> None:
        super().__init__()
        self.network = model.decoder
        self.dynamics: Dynamics = model.dynamics

    def forward(self, z: Tensor, noise: Tensor) -> Tensor:
        level = torch.full((z.shape[0],), self.dynamics.noise_level, device=z.device)
        time = level if self.dynamics.conditions_on_time else None
        prediction = predict(self.dynamics, lambda y: self.network(y.to(z.dtype), z, time).float(), noise)
        return self.dynamics.clean_estimate(noise, prediction.float(), level).to(z.dtype)


class _DecoderWithNoise(nn.Module):
    """z (B, c, h, w) -> images (B, 3, H, W), from the default noise of `decode`."""

    noise: Tensor

    def __init__(self, model: DCSSDAE, noise: Tensor) -> None:
        super().__init__()
        self.decoder = _Decoder(model)
        self.factor = model.config.downsample_factor
        self.register_buffer("noise", noise.to(model.device))

    def forward(self, z: Tensor) -> Tensor:
        batch, height, width = z.shape[0], z.shape[2] * self.factor, z.shape[3] * self.factor
        noise = self.noise.narrow(0, 0, 3 * height * width).view(1, 3, height, width)
        return self.decoder(z, noise.expand(batch, -1, -1, -1))


@dataclass(frozen=True)
class _Exporter:
    """Writes the parts of a model into a folder, each checked; the fields are `export_model`'s arguments."""

    model: DCSSDAE
    folder: Path
    format: Format
    size: tuple[int, int] | None
    noise: Tensor
    bake_noise: bool
    packages: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        """What holds for both parts, for the manifest."""
        sides: dict[str, Any] = {} if self.size else {"h": {"min": SMALLEST_SIDE}, "w": {"min": SMALLEST_SIDE}}
        about_noise = {"pixels": self.noise.numel() // 3, **({} if self.bake_noise else {"file": NOISE_FILE})}
        return {"ranges": {"batch": {"min": 1}, **sides}, "default_noise": about_noise}

    def encoder(self) -> ExportedPart:
        latent = ["batch", self.model.config.latent_channels, *self._sides(1)]
        with torch.no_grad():
            given = self._encode(self._images(1, *(self._traced_sides() if self.size else [SMALLEST_SIDE] * 2)))
        names = ["mean", "logvar"][: len(given)]
        return self._export(
            "encoder",
            _Encoder(self.model),
            {"x": ["batch", 3, *self._sides(self.factor)]},
            dict.fromkeys(names, latent),
            lambda batch, height, width: (self._images(batch, height, width),),
            self._encode,
        )

    def decoder(self) -> ExportedPart:
        latent = ["batch", self.model.config.latent_channels, *self._sides(1)]
        image = ["batch", 3, *self._sides(self.factor)]
        module = _DecoderWithNoise(self.model, self.noise) if self.bake_noise else _Decoder(self.model)
        return self._export(
            "decoder",
            module,
            {"z": latent} if self.bake_noise else {"z": latent, "noise": image},
            {"image": image},
            self._latents,
            self._decode,
        )

    @property
    def factor(self) -> int:
        return self.model.config.downsample_factor

    def _sides(self, factor: int) -> list[int | str]:
        """The last two sides of a tensor with `factor` times the latent's, for the manifest."""
        if self.size:
            return [side // self.factor * factor for side in self.size]
        return [name if factor == 1 else f"{factor}*{name}" for name in ("h", "w")]

    def _traced_sides(self) -> tuple[int, int]:
        """Sides in latents to trace with."""
        if self.size:
            return self.size[0] // self.factor, self.size[1] // self.factor
        return _sides_for_any_size(self.factor)

    def _compared_sides(self) -> list[tuple[int, int, int]]:
        """Batch, height and width in latents to compare with the model at."""
        if self.size:
            return [(batch, *self._traced_sides()) for batch in (1, 2)]
        fitting = [(1, *self._traced_sides()), (3, SMALLEST_SIDE + 1, SMALLEST_SIDE), (1, SMALLEST_SIDE, SMALLEST_SIDE)]
        return [shape for shape in fitting if 3 * shape[1] * shape[2] * self.factor**2 <= self.noise.numel()]

    def _images(self, batch: int, height: int, width: int) -> Tensor:
        """Random images (batch, 3, height · f, width · f) in [-1, 1]."""
        shape = (batch, 3, height * self.factor, width * self.factor)
        images = 2.0 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1.0
        return images.to(self.model.device, self.model.dtype)

    def _encode(self, x: Tensor) -> tuple[Tensor, ...]:
        posterior = self.model.encode(x).latent_dist
        return (posterior.mean,) if posterior.logvar is None else (posterior.mean, posterior.logvar)

    def _latents(self, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
        """The decoder's inputs: latents of random images, and noise; of one image alone, the default noise."""
        z = self.model.encode(self._images(batch, height, width)).latent_dist.mode()
        if self.bake_noise:
            return (z,)
        shape = (batch, 3, height * self.factor, width * self.factor)
        if batch == 1:
            return z, self.noise[: shape[1] * shape[2] * shape[3]].view(shape).to(z.device)
        return z, torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(z.device)

    def _decode(self, z: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        # Of one image alone without any: that the default noise of all sizes is the beginning of one vector is checked.
        return (self.model.decode(z, noise=None if len(z) == 1 else noise).sample,)

    def _export(
        self,
        part: str,
        module: nn.Module,
        inputs: dict[str, list[int | str]],
        outputs: dict[str, list[int | str]],
        make_inputs: Callable[[int, int, int], tuple[Tensor, ...]],
        expected: Callable[..., tuple[Tensor, ...]],
    ) -> ExportedPart:
        path = self.folder / f"{part}.{self.format}"
        kind = str(self.model.config[part]["class_path"])
        with torch.no_grad():
            with _one_line(f"the {part} {kind} cannot be exported"), _quiet():
                program = self._trace(module, inputs)
                if kind in COMPONENTS[part]:
                    _drop_shape_assertions(program)
                self._write(program, path, inputs, list(outputs))
            with _one_line(f"the exported {part} {kind} cannot be loaded"):
                run = self._load(path)
            difference = 0.0
            for shape in self._compared_sides():
                values = make_inputs(*shape)
                size = f"{shape[1] * self.factor}×{shape[2] * self.factor} pixels, batch {shape[0]}"
                hint = "" if self.size else "; fix a size to export it for that one"
                with _one_line(f"the exported {part} {kind} fails at {size}{hint}"):
                    answers = run(values)
                difference = max(difference, _largest_difference(answers, expected(*values)))
        tolerance = TOLERANCES[self.model.dtype]
        if not difference <= tolerance:
            raise InputError(
                f"the exported {part} {kind} differs from the model by {difference:.2g}, more than {tolerance:g}: "
                "nothing was written"
            )
        return ExportedPart(path.name, inputs, outputs, difference)

    def _trace(self, module: nn.Module, inputs: Mapping[str, Sequence[int | str]]) -> ExportedProgram:
        dims: dict[str | int, Any] = {"batch": Dim("batch", min=1)}
        sides = {"batch": 2}
        for name, side in zip(("h", "w"), self._traced_sides(), strict=True):
            dims[name], sides[name] = Dim(name, min=SMALLEST_SIDE), side
            dims[f"{self.factor}*{name}"], sides[f"{self.factor}*{name}"] = self.factor * dims[name], self.factor * side
        example = [
            torch.zeros(
                [side if isinstance(side, int) else sides[side] for side in shape],
                dtype=torch.float32 if name == "noise" else self.model.dtype,
                device=self.model.device,
            )
            for name, shape in inputs.items()
        ]
        varying = [{axis: dims[side] for axis, side in enumerate(shape) if side in dims} for shape in inputs.values()]
        return torch.export.export(
            module.eval(),
            tuple(example),
            dynamic_shapes=tuple(varying),
            prefer_deferred_runtime_asserts_over_guards=True,
        )

    def _write(
        self, program: ExportedProgram, path: Path, inputs: Mapping[str, Sequence[int | str]], outputs: Sequence[str]
    ) -> None:
        metadata = {**_describe_model(self.model), **self.describe()}
        if self.format == "pt2":
            content = io.BytesIO()  # PyTorch's writer of files aborts the process where a disk is full
            torch.export.save(program, content, extra_files={MANIFEST: json.dumps(metadata)})
            with naming(path):
                path.write_bytes(content.getbuffer())
            return
        stored = sum(tensor.nbytes for tensor in program.state_dict.values())
        written = torch.onnx.export(program, dynamo=True, verbose=False, external_data=False)
        assert written is not None
        _name_tensors(written.model, inputs, outputs)
        written.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
        with naming(path):
            written.save(path, external_data=stored > LARGEST_ONNX_BYTES)

    def _load(self, path: Path) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """A function of a written file's inputs, run by what will run it elsewhere."""
        if self.format == "pt2":
            module = torch.export.load(path).module()

            def run(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                answer = module(*values)
                return answer if isinstance(answer, tuple) else (answer,)

            return run
        session = self.packages["onnxruntime"].InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]

        def run_onnx(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            given = {name: value.numpy() for name, value in zip(names, values, strict=True)}
            return tuple(map(torch.from_numpy, session.run(None, given)))

        return run_onnx


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


def _name_tensors(model: Any, inputs: Mapping[str, Sequence[int | str]], outputs: Sequence[str]) -> None:
    """Name the inputs and outputs of an `onnx_ir.Model`, and their sides that vary, as export.json does.

    The exporter's own naming leaves sides with symbols such as s77, and clashes with tensors inside of that name.
    """
    within = [tensor for node in model.graph for tensor in node.outputs]
    for tensor in within:
        if tensor.name in (*inputs, *outputs):
            tensor.name = f"{tensor.name}_within"
    sides = {}
    for tensor, (name, shape) in zip(model.graph.inputs, inputs.items(), strict=True):
        tensor.name = name
        for given, side in zip(tensor.shape, shape, strict=True):
            if isinstance(side, str):  # s77 is batch, and 8*s39 is 8*h
                sides[str(given.value).rpartition("*")[2]] = side.rpartition("*")[2]
    for tensor, name in zip(model.graph.outputs, outputs, strict=True):
        tensor.name = name
    for tensor in (*model.graph.inputs, *within):
        for axis, side in enumerate(tensor.shape or ()):
            # Unknown ones stay so: runtimes take sides of one name for equal.
            if not isinstance(side, int) and side.value is not None:
                tensor.shape[axis] = re.sub(r"[a-z]\w*", lambda found: sides.get(found[0], found[0]), str(side.value))


def _largest_difference(answers: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, against the largest expected value, or 1; infinite where something is not finite."""
    if len(answers) != len(expected) or any(a.shape != b.shape for a, b in zip(answers, expected, strict=False)):
        return float("inf")
    largest = 0.0
    for answer, wanted in zip(answers, expected, strict=True):
        ratio = float((answer.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1.0))
        largest = max(largest, ratio if ratio == ratio else float("inf"))
    return largest


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn whatever goes wrong into an `InputError` of one line; exporters raise exceptions of every kind."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reasons = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"{what}: {type(error).__name__}: {reasons[0] if reasons else ''}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' own chatter off the terminal: what matters is raised, and the outcome is compared."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
