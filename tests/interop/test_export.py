"""Exported programs against the model they come from: torch.export and ONNX, fixed sizes and any size."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TINY_DECODER, image, tiny
from torch import Tensor, nn

from dc_ssdae import DCSSDAE, DiagonalGaussian, InputError, __version__
from dc_ssdae.cli.common import describe
from dc_ssdae.decoding import default_noise
from dc_ssdae.interop import export
from dc_ssdae.interop.export import Format, export_model

DISK_KIB = 64
"""Of the file system that `small_disk` gives."""

FLOW = {"dynamics": {"class_path": "FlowMatching"}}
SETTINGS = TINY_DECODER["init_args"]
PATCHES = {
    "decoder": {"init_args": {**SETTINGS, "patch": 4, "multipliers": SETTINGS["multipliers"][-2:]}},
    "dynamics": {"init_args": {"prediction": "image"}},
}
SIZES = [(1, 2, 2), (3, 2, 5), (1, 8, 16), (1, 16, 9), (2, 33, 16)]
"""Batch, and sides in latents, on both sides of the 512 tokens at which attention changes its form."""


class Program:
    """An exported part as another program would run it, from the folder alone."""

    def __init__(self, folder: Path, part: str) -> None:
        self.described = json.loads((folder / "export.json").read_text())[part]
        path = folder / self.described["file"]
        if path.suffix == ".pt2":
            module = torch.export.load(path).module()
            self.run = lambda *inputs: module(*inputs)
        else:
            onnxruntime = pytest.importorskip("onnxruntime")
            session = onnxruntime.InferenceSession(path)
            names = list(self.described["inputs"])
            assert names == [given.name for given in session.get_inputs()]
            assert list(self.described["outputs"]) == [given.name for given in session.get_outputs()]
            self.run = lambda *inputs: session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            outputs = self.run(*inputs)
        return [torch.as_tensor(output) for output in ([outputs] if isinstance(outputs, Tensor) else outputs)]


def difference(answers: list[Tensor], expected: list[Tensor]) -> float:
    assert [answer.shape for answer in answers] == [wanted.shape for wanted in expected]
    return max(float((answer - wanted).abs().max()) for answer, wanted in zip(answers, expected, strict=True))


@torch.no_grad()
def check(model: DCSSDAE, folder: Path, sizes: list[tuple[int, int, int]]) -> None:
    """Compare both programs with the model, from the default noise and from other noise."""
    encoder, decoder = Program(folder, "encoder"), Program(folder, "decoder")
    factor = model.config.downsample_factor
    noise = load_file(folder / "noise.safetensors")["noise"]
    for batch, height, width in sizes:
        x = image(batch, height * factor, width * factor)
        posterior = model.encode(x).latent_dist
        given = [posterior.mean] if posterior.logvar is None else [posterior.mean, posterior.logvar]
        assert difference(encoder(x), given) <= 1e-4
        z = posterior.mode()
        fixed = noise[: x[0].numel()].view(1, *x.shape[1:]).expand(batch, -1, -1, -1)
        for start, wanted in ((fixed, model.decode(z)), (other := torch.randn_like(x), model.decode(z, noise=other))):
            assert difference(decoder(z, start.contiguous()), [wanted.sample]) <= 1e-4


@pytest.mark.parametrize(
    ("encoder", "given", "format"),
    [
        (encoder, given, format)
        for encoder in ("DCEncoder", "KLEncoder")
        for given in ({}, FLOW, PATCHES)
        for format in ("pt2", "onnx")
    ],
)
@pytest.mark.slow
def test_one_program_holds_for_all_sizes(encoder: str, given: dict[str, Any], format: Format, tmp_path: Path) -> None:
    model = tiny(8, encoder, **given)
    written = export_model(model, tmp_path / "out", format)
    assert max(written.encoder.largest_difference, written.decoder.largest_difference) <= 1e-4
    assert written.decoder.inputs == {"z": ["batch", 4, "h", "w"], "noise": ["batch", 3, "8*h", "8*w"]}
    check(model, tmp_path / "out", SIZES)


MEASURED = {"scaling_factor": 0.5, "shift_factor": 0.25, "latents_mean": [0.0] * 4, "latents_std": [2.0] * 4}


@pytest.mark.slow
def test_onnx_of_a_fixed_size(tmp_path: Path) -> None:
    model = tiny(8, "KLEncoder", **FLOW)
    written = export_model(model, tmp_path / "out", "onnx", (16, 24))
    assert written.encoder.inputs == {"x": ["batch", 3, 16, 24]}
    check(model, tmp_path / "out", [(1, 2, 3), (3, 2, 3)])


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_fixed_size_of_many_tokens_and_an_encoder_without_variance(format: Format, tmp_path: Path) -> None:
    halvings = 4
    encoder = {
        "class_path": "DCEncoder",
        "init_args": {
            "widths": [16] * halvings + [32],
            "depths": [0] + [1] * halvings,
            "block_types": ["ResBlock"] * halvings + ["EfficientViTBlock"],
            "variational": False,
            "out_shortcut": True,
        },
    }
    torch.manual_seed(0)
    model = tiny(16)
    model = DCSSDAE(4, 16, encoder=encoder, decoder=model.config.decoder).eval()
    written = export_model(model, tmp_path / "out", format, (208, 192))
    assert list(written.encoder.outputs) == ["mean"]
    check(model, tmp_path / "out", [(2, 13, 12)])


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_baked_noise_of_any_size_ends_at_its_pixels(format: Format, tmp_path: Path) -> None:
    model = tiny(8, "KLEncoder")
    export_model(model, tmp_path / "out", format, bake_noise=True, noise_size=192)
    decoder = Program(tmp_path / "out", "decoder")
    for shape in ((2, 4, 24, 24), (1, 4, 2, 288)):
        z = torch.randn(shape)
        with torch.no_grad():
            assert difference(decoder(z), [model.decode(z).sample]) <= 1e-4
    with pytest.raises(Exception, match=r"exceeds dimension size|Reshape"):
        decoder(torch.randn(1, 4, 24, 25))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (40, 8), (16, 72), (96, 96)])
def test_default_noise_of_a_smaller_image_is_its_beginning(height: int, width: int) -> None:
    model = tiny(8, "KLEncoder")
    noise = default_noise(104, 96).flatten()
    z = torch.randn(2, 4, height // 8, width // 8)
    start = noise[: 3 * height * width].view(1, 3, height, width).expand(2, -1, -1, -1)
    with torch.no_grad():
        assert torch.equal(model.decode(z, noise=start).sample, model.decode(z).sample)


def refusal(model: DCSSDAE, out: Path, **settings: Any) -> str:
    with pytest.raises(InputError) as raised:
        export_model(model, out, **settings)
    assert sorted(out.parent.iterdir()) == ([out] if out.exists() else [])
    line = str(raised.value)
    assert "\n" not in line
    return line


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    model = tiny(8, "KLEncoder")
    assert refusal(model, out, format="onx").startswith("unknown format 'onx' (did you mean 'onnx'?)")
    assert refusal(model, out, size=(16, 12)) == "width is 12 pixels; it must be a multiple of f = 8, from 8 on"
    assert refusal(model, out, noise_size=8) == "noise_size is 8 pixels; it must be a multiple of f = 8, from 16 on"
    baked = refusal(model, out, noise_size=184, bake_noise=True)
    assert baked == "noise_size is 184 pixels; it must be a multiple of f = 8, from 192 on"
    energy = {"class_path": "EquilibriumMatching", "init_args": {"explicit_energy": "dot"}}
    assert "explicit energy (dot)" in refusal(tiny(8, dynamics=energy), out)
    assert "call model.eval()" in refusal(tiny(8).train(), out)
    assert "float32 on the CPU" in refusal(tiny(8).half(), out, format="onnx")
    tiled = tiny(8)
    tiled.enable_tiling()
    assert "disable_tiling" in refusal(tiled, out)
    out.mkdir()
    (out / "mine.txt").touch()
    assert "is not an empty folder" in refusal(model, out)
    (out / "mine.txt").unlink()
    out.rmdir()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'dc-ssdae[onnx]'" in refusal(model, out, format="onnx")


def test_program_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(8, "KLEncoder")
    honest = export._Encoder.forward
    monkeypatch.setattr(export._Encoder, "forward", lambda self, x: tuple(y + 1e-2 for y in honest(self, x)))
    line = refusal(model, tmp_path / "out", size=(8, 8))
    assert line.startswith("the exported encoder KLEncoder differs from the model by 0.0")
    assert line.endswith("more than 0.0001: nothing was written")


class Patches(nn.Module):
    """A user's encoder; `faulty` makes its path depend on the values of pixels, which no program can hold."""

    def __init__(self, latent_channels: int, downsample_factor: int, faulty: bool = False) -> None:
        super().__init__()
        self.faulty = faulty
        self.conv = nn.Conv2d(3, 2 * latent_channels, downsample_factor, downsample_factor)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        if self.faulty and x.mean() > 0:
            x = -x
        return DiagonalGaussian.from_moments(self.conv(x))


def with_patches(encoder: dict[str, Any], **settings: Any) -> DCSSDAE:
    parts = {"class_path": f"{Patches.__module__}.Patches", "init_args": encoder}
    return DCSSDAE(4, 8, encoder=parts, decoder=tiny(8).config.decoder, classes=[Patches], **settings).eval()


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(small_disk: Path, format: Format) -> None:
    with pytest.raises((OSError, InputError)) as caught:
        export_model(tiny(), small_disk / "out", format)
    message = describe(caught.value)
    assert "No space left" in message
    assert f"encoder.{format}" in message
    assert "\n" not in message
    assert not list(small_disk.iterdir())


def test_users_own_encoder_and_baked_noise_and_what_the_files_tell(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = with_patches({}, **MEASURED)
    written = export_model(model, out, "pt2", (16, 24), bake_noise=True)
    assert written.files == ["decoder.pt2", "encoder.pt2", "export.json"]
    x, z = image(2, 16, 24), torch.randn(3, 4, 2, 3)
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
        assert difference(Program(out, "encoder")(x), [posterior.mean, posterior.logvar]) <= 1e-4
        assert difference(Program(out, "decoder")(z), [model.decode(z).sample]) <= 1e-4
    told = json.loads((out / "export.json").read_text())
    inside = {"export.json": ""}
    torch.export.load(out / "encoder.pt2", extra_files=inside)
    for content in (told, json.loads(inside["export.json"])):
        assert content["dc_ssdae_version"] == __version__
        assert (content["latent_channels"], content["downsample_factor"]) == (4, 8)
        assert {name: content[name] for name in MEASURED} == MEASURED
        assert content["dynamics"]["class_path"] == "EquilibriumMatching"
        assert content["default_noise"] == {"pixels": 16 * 24}
        assert content["ranges"] == {"batch": {"min": 1}}
    assert told["encoder"]["inputs"] == {"x": ["batch", 3, 16, 24]}
    assert told["decoder"]["inputs"] == {"z": ["batch", 4, 2, 3]}
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_users_own_encoder_that_cannot_be_traced(tmp_path: Path) -> None:
    line = refusal(with_patches({"faulty": True}), tmp_path / "out", size=(8, 16))
    assert line.startswith(f"the encoder {Patches.__module__}.Patches cannot be exported: ")
