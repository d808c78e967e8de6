"""Exported programs against the model they come from: torch.export and ONNX, fixed sizes and any size."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TINY_DECODER, image, refusal, tiny
from torch import Tensor, nn

from dc_ssdae import DCSSDAE, DiagonalGaussian, InputError, __version__
from dc_ssdae.cli.common import describe
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
POINT = {
    "class_path": "DCEncoder",
    "init_args": {"widths": [16, 16, 16, 32], "depths": [0, 1, 1, 1], "variational": False, "out_shortcut": True},
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
            session = pytest.importorskip("onnxruntime").InferenceSession(path)
            for described, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
                assert self.described[described] == {given.name: given.shape for given in found}
            names = list(self.described["inputs"])
            self.run = lambda *inputs: session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        with torch.no_grad():
            outputs = self.run(*inputs)
        return [torch.as_tensor(output) for output in ([outputs] if isinstance(outputs, Tensor) else outputs)]


def assert_close(answers: list[Tensor], *expected: Tensor) -> None:
    torch.testing.assert_close(answers, list(expected), atol=1e-4, rtol=0)


@torch.no_grad()
def check(model: DCSSDAE, folder: Path, sizes: list[tuple[int, int, int]]) -> None:
    """Compare both programs with the model, from the default noise and from other noise."""
    encoder, decoder = Program(folder, "encoder"), Program(folder, "decoder")
    factor = model.config.downsample_factor
    noise = load_file(folder / "noise.safetensors")["noise"]
    for batch, height, width in sizes:
        x = image(batch, height * factor, width * factor)
        posterior = model.encode(x).latent_dist
        assert_close(encoder(x), *posterior.moments)
        z, other = posterior.mode(), torch.randn_like(x)
        fixed = noise[: x[0].numel()].view(1, *x.shape[1:]).expand(batch, -1, -1, -1)
        assert_close(decoder(z, fixed.contiguous()), model.decode(z).sample)
        assert_close(decoder(z, other), model.decode(z, noise=other).sample)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
@pytest.mark.parametrize("given", [{}, FLOW, PATCHES])
@pytest.mark.parametrize("encoder", ["DCEncoder", "KLEncoder"])
def test_one_program_holds_for_all_sizes(encoder: str, given: dict[str, Any], format: Format, tmp_path: Path) -> None:
    model = tiny(8, encoder, **given)
    written = export_model(model, tmp_path / "out", format)
    assert max(written.encoder.largest_difference, written.decoder.largest_difference) <= 1e-4
    assert written.decoder.inputs == {"z": ["batch", 4, "h", "w"], "noise": ["batch", 3, "8*h", "8*w"]}
    check(model, tmp_path / "out", SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_fixed_size_of_many_tokens_and_an_encoder_without_variance(format: Format, tmp_path: Path) -> None:
    model = DCSSDAE(4, 8, encoder=POINT, decoder=tiny().config.decoder, **FLOW).eval()
    written = export_model(model, tmp_path / "out", format, (184, 192))
    assert written.encoder.inputs == {"x": ["batch", 3, 184, 192]}
    assert list(written.encoder.outputs) == ["mean"]
    check(model, tmp_path / "out", [(3, 23, 24)])


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_baked_noise_of_any_size_ends_at_its_pixels(format: Format, tmp_path: Path) -> None:
    model = tiny(8, "KLEncoder")
    export_model(model, tmp_path / "out", format, bake_noise=True, noise_size=192)
    decoder = Program(tmp_path / "out", "decoder")
    for shape in ((2, 4, 24, 24), (1, 4, 2, 288)):
        z = torch.randn(shape)
        with torch.no_grad():
            assert_close(decoder(z), model.decode(z).sample)
    with pytest.raises(Exception, match=r"exceeds dimension size|Reshape"):
        decoder(torch.randn(1, 4, 24, 25))


def refused(model: DCSSDAE, out: Path, **settings: Any) -> str:
    """The one line with which an export is refused, which leaves nothing."""
    message = refusal(export_model, model, out, **settings)
    assert sorted(out.parent.iterdir()) == ([out] if out.exists() else [])
    return message


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    model = tiny(8, "KLEncoder")
    energy = {"class_path": "EquilibriumMatching", "init_args": {"explicit_energy": "dot"}}
    for odd, settings, told in (
        (model, {"format": "onx"}, "did you mean 'onnx'?"),
        (model, {"size": (16, 12)}, "12 pixels: sides are multiples of f = 8, from 8 on"),
        (model, {"noise_size": 8}, "8 pixels: sides are multiples of f = 8, from 16 on"),
        (model, {"noise_size": 184, "bake_noise": True}, "from 192 on"),
        (tiny(8, dynamics=energy), {}, "explicit energy"),
    ):
        assert told in refused(odd, out, **settings)
    out.mkdir()
    (out / "mine.txt").touch()
    assert "is not an empty folder" in refused(model, out)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'dc-ssdae[onnx]'" in refused(model, out, format="onnx", size=(8, 8), overwrite=True)


def test_program_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = export._Encoder.forward
    monkeypatch.setattr(export._Encoder, "forward", lambda self, x: tuple(y + 1e-2 for y in honest(self, x)))
    line = refused(tiny(8, "KLEncoder"), tmp_path / "out", size=(8, 8))
    assert line.startswith("the exported encoder KLEncoder differs by 0.0")


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(small_disk: Path, format: Format) -> None:
    with pytest.raises((OSError, InputError)) as caught:
        export_model(tiny(), small_disk / "out", format)
    message = describe(caught.value)
    assert "No space left" in message
    assert f"encoder.{format}" in message
    assert "\n" not in message
    assert not list(small_disk.iterdir())


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


def with_patches(faulty: bool, **settings: Any) -> DCSSDAE:
    parts = {"class_path": f"{Patches.__module__}.Patches", "init_args": {"faulty": faulty}}
    return DCSSDAE(4, 8, encoder=parts, decoder=tiny(8).config.decoder, classes=[Patches], **settings).eval()


MEASURED = {"scaling_factor": 0.5, "shift_factor": 0.25, "latents_mean": [0.0] * 4, "latents_std": [2.0] * 4}


def test_users_own_encoder_and_baked_noise_and_what_the_files_tell(tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = with_patches(False, **MEASURED)
    written = export_model(model, out, "pt2", (16, 24), bake_noise=True)
    assert written.files == ["decoder.pt2", "encoder.pt2", "export.json"]
    x, z = image(2, 16, 24), torch.randn(3, 4, 2, 3)
    with torch.no_grad():
        assert_close(Program(out, "encoder")(x), *model.encode(x).latent_dist.moments)
        assert_close(Program(out, "decoder")(z), model.decode(z).sample)
    told = json.loads((out / "export.json").read_text())
    inside = {"export.json": ""}
    torch.export.load(out / "encoder.pt2", extra_files=inside)
    expected = {
        **MEASURED,
        "dc_ssdae_version": __version__,
        "latent_channels": 4,
        "downsample_factor": 8,
        "dynamics": dict(model.config.dynamics),
        "default_noise": {"pixels": 16 * 24},
        "ranges": {"batch": {"min": 1}},
    }
    for content in (told, json.loads(inside["export.json"])):
        assert {name: content[name] for name in expected} == expected
    assert told["encoder"]["inputs"] == {"x": ["batch", 3, 16, 24]}
    assert told["decoder"]["inputs"] == {"z": ["batch", 4, 2, 3]}
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_users_own_encoder_that_cannot_be_traced(tmp_path: Path) -> None:
    line = refused(with_patches(True), tmp_path / "out", size=(8, 16))
    assert line.startswith(f"the encoder {Patches.__module__}.Patches cannot be exported: ")
