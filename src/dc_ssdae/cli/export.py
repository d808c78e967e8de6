"""`dc-ssdae export`: writes encoder and one-step decoder as programs for torch.export, C++ and ONNX."""

from dataclasses import dataclass
from typing import Literal

from dc_ssdae.cli.common import check_output_folder, load_model, say
from dc_ssdae.cli.options import ModelOptions, OutputOptions
from dc_ssdae.errors import InputError
from dc_ssdae.files import naming
from dc_ssdae.settings import setting


@dataclass(kw_only=True)
class Options(ModelOptions, OutputOptions):
    """Export a model's encoder and one-step decoder as programs that run without this package.

    Writes DIR/encoder.FORMAT (x -> mean, logvar), DIR/decoder.FORMAT (z, noise -> image), DIR/noise.safetensors (the
    default noise of decoding) and DIR/export.json (shapes, f, c and latent statistics). Each program is loaded again
    and compared with the model; if one differs, nothing is written.

    Args:
        out: folder to write to; it must be empty or not exist.
        format: pt2 is torch.export's format, for PyTorch in Python and, once compiled, C++; onnx is a float32 file per
            program, for ONNX Runtime and others (requires pip install 'dc-ssdae[onnx]').
        size: fixed height and width of the images, or one number for both, multiples of f; by default the programs
            accept any size from 2 f on. The batch size is always free.
        bake_noise: make the default noise part of the decoder, whose only input is then z.
        noise_size: side of the largest square image for which the default noise is saved, by default 1024; with --size
            the noise has that size.
    """

    format: Literal["pt2", "onnx"] = "pt2"
    size: list[int] | None = setting(None, at_least=1, spaced=True, metavar="PIXELS")
    bake_noise: bool = False
    noise_size: int | None = setting(None, at_least=1, metavar="PIXELS")


def run(options: Options) -> None:
    """Export a model."""
    size = options.size
    if size is not None and (len(size) > 2 or options.noise_size is not None):
        raise InputError("--size takes one or two numbers, and cannot be given with --noise_size, which it also sets")
    if options.format == "onnx":
        if options.device not in ("auto", "cpu") or options.dtype != "float32":
            raise InputError("--device and --dtype are for --format pt2; ONNX is written from float32 on the CPU")
        options.device = "cpu"
    check_output_folder(options)  # before the seconds that loading takes
    model = load_model(options)
    from dc_ssdae.interop.export import export_model

    given = options.given("format", "bake_noise", "noise_size", "overwrite")
    with naming(options.out):
        export = export_model(model, options.out, size=(size[0], size[-1]) if size else None, **given)
    for part in (export.encoder, export.decoder):
        difference = f"largest difference from the model {part.largest_difference:.1e}"
        say(f"{part.file}: {part.inputs} -> {part.outputs}; {difference}")
    say(f"{', '.join(export.files)} -> {options.out}")
