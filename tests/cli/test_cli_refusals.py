"""What does not fit is refused by every command in one line, and nothing is written."""

import shutil
from pathlib import Path

import pytest
from cli_samples import Refusal, save_photos

GIVEN = {
    "reconstruct": "photo.png --model small --out out --device cpu",
    "encode": "photo.png --model small --out out",
    "export": "--model small --out out",
    "eval": "--model small --data photos --size 32 --workers 0 --device cpu --metrics psnr --out out",
    "compare": "bicubic:4 --data photos --size 32 --workers 0 --device cpu --metrics psnr --out out --rounds 1",
    "stats": "--model small --data photos --size 32 --workers 0 --device cpu",
    "latents": "--model small --size 32 --workers 0 --device cpu",
    "bench train": "--config demo --device cpu",
    "distill": "--training.output out",
}
"""Words of a command before those that a case adds."""


@pytest.fixture(autouse=True)
def workplace_for_all(workplace: None, photo: Path, model_dir: Path) -> None:
    """A model, photos in two parts, an image that is none, and a run."""
    shutil.copytree(model_dir, "small")
    save_photos(Path("photos"), "train/0", "train/1", "validation/2")
    for folder in ("broken", "damaged", "run"):
        Path(folder).mkdir()
    Path("broken/a.png").write_bytes(b"no picture")
    Path("damaged/config.json").write_text("{}")
    Path("run/config.yaml").write_text("model: {latent_channels: 4, downsample_factor: 8}\n")
    Path("run/model").symlink_to(Path("small").absolute())


def files() -> list[Path]:
    return sorted(path for path in Path().rglob("*") if not path.is_dir())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("", "reconstruct"),
        ("--debgu info", "did you mean '--debug'?"),
        ("bench", "data, decode, encode, train"),
        ("bench tain", "did you mean 'train'?"),
        ("reconstruct --seed 4294967296", "--seed"),
        ("reconstruct --device cuda:99", "'cuda:99'"),
        ("reconstruct --model absent", "'absent'"),
        ("reconstruct --model nobody/nothing", "nobody/nothing"),
        ("reconstruct --sampler one_step --steps 2", "'num_steps'"),
        ("reconstruct --start 0.5", "--draft"),
        ("encode --seed 1", "--seed is for --sample"),
        ("export --size 8 8 8", "--size"),
        ("export --size 8 --noise_size 16", "--noise_size"),
        ("export --format onnx --dtype bfloat16", "--dtype"),
        ("eval --protocol dcea", "did you mean 'dcae'"),
        ("eval --metrics psnr,lpisp", "did you mean 'lpips'"),
        ("eval --size 20", "20"),
        ("eval --data no/such/folder", "'no/such/folder'"),
        ("eval --data broken", "'broken/a.png'"),
        ("eval --import absent", "'absent'"),
        ("eval --metrics psnr,lpips --download", "https://"),
        ("eval --model jpeg:75 --add-to-model", "--add-to-model"),
        ("eval --model python:peers.greedy --batch 2", "out of memory with --batch 2"),
        ("compare a=jpeg:50 a=bicubic:4", "'a'"),
        ("compare mine=small --sampler one_step --steps 2", "mine: unknown setting"),
        ("stats --size 30", "f = 8"),
        ("stats --model owner/model", "owner/model"),
        ("stats --model photos", "config.json is missing"),
        ("stats --data broken", "a.png"),
        ("latents photos out --size 30", "f = 8"),
        ("latents photos out --seed 1", "--seed is for --store sample"),
        ("latents photos/train out --split validation", "--split is validation"),
        ("pack photos out --size 0", "--size is '0'"),
        ("pack photos out --size half", "--size is 'half'"),
        ("pack photos out --format png --quality 90", "--quality"),
        ("info dc_f32c32_eqn", "did you mean 'dc_f32c32_eqm'"),
        ("info small/config.json", "small/config.json"),
        ("info --groups", "--groups"),
        ("info demo --groups --dtype bfloat16", "--groups"),
        ("bench decode jpeg:75", "jpeg:75"),
        ("bench data absent", "absent"),
        ("bench train --compare compile=true", "'compile'"),
        ("bench train --compare training.compil=true", "'compil'"),
        ("bench train --compare losses", "--compare is 'losses'"),
        ("distill", "--teacher"),
        ("distill --teacher absent", "absent"),
        ("distill --teacher damaged", "latent_channels"),
        ("distill --teacher small --losses.lpips 0", "data.root"),
        ("distill --resume run", "dc-ssdae train --resume"),
        ("distill --resume run --steps 3", "--steps"),
        ("distill --resume absent", "absent"),
    ],
)
def test_it_is_one_line_and_nothing_is_written(
    words: str, named: str, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing listens
    before = files()
    command = next((name for name in GIVEN if words.startswith(name)), "")
    assert named in refusal(*command.split(), *GIVEN.get(command, "").split(), *words.removeprefix(command).split())
    assert files() == before
