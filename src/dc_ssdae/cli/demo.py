"""`dc-ssdae demo`: reconstruct photos with the shipped model, train a small one on others, write a report."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dc_ssdae.cli.common import check_output_folder, say, select_device
from dc_ssdae.cli.options import DeviceOptions, OutputOptions, SeedOptions
from dc_ssdae.errors import counted
from dc_ssdae.presets import SHIPPED_MODEL
from dc_ssdae.settings import setting

if TYPE_CHECKING:
    import torch

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.evaluation.reconstruction import PhotoResult
    from dc_ssdae.training.config import RunConfig

PRESET = "demo"
SAMPLE_PHOTOS = "dc_ssdae.data.sample_photos.SamplePhotos"


@dataclass(kw_only=True)
class Options(OutputOptions, SeedOptions, DeviceOptions):
    """Reconstruct photos with the model that comes with this package, train a small model, and write a report.

    The small model is trained by equilibrium matching on photos that come with scikit-image. Needs no GPU and downloads
    nothing.

    Args:
        minutes: training time in minutes; by default 3, or no limit with --steps.
        steps: number of training steps; without --minutes, such a run is reproducible.
        dtype: precision in which the networks compute during training.
    """

    minutes: float | None = setting(None, at_least=0.001, metavar="M")
    steps: int | None = setting(None, at_least=1, metavar="N")
    out: Path = setting(Path("runs/demo"), metavar="DIR")
    dtype: Literal["float32", "bfloat16"] = "float32"


def run(options: Options) -> None:
    """Train, evaluate, save and report."""
    device = select_device(options.device)
    from dc_ssdae.training.run import check_new, remove_run

    check_output_folder(options)
    file = options.out / "config.yaml"
    if file.is_file() and SAMPLE_PHOTOS in file.read_text(encoding="utf-8", errors="replace"):
        remove_run(options.out)  # an earlier demo may be replaced, no other run
    check_new(options.out)  # before the seconds that the shipped model takes
    import torch

    from dc_ssdae.autoencoder import DCSSDAE
    from dc_ssdae.cli.run_config import config_yaml
    from dc_ssdae.data.sample_photos import sample_photos
    from dc_ssdae.training.start import start_run

    config = _configuration(options)
    held_out = sample_photos("held_out")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    say(f"Reconstructing {counted(len(held_out), 'photo')} with {SHIPPED_MODEL}, which comes with this package")
    shipped = _evaluate(DCSSDAE.from_pretrained(), held_out, device)
    say(f"Training preset {PRESET!r} on {device}")
    start_run(config, config_yaml(config), options.out, cpu=device.type == "cpu")
    model = DCSSDAE.from_pretrained(options.out / "model")
    _report(options.out, shipped, _evaluate(model, held_out, device), config)
    say(f"Model:  {options.out / 'model'}\nReport: {options.out / 'report.html'}")


def _configuration(options: Options) -> "RunConfig":
    from dc_ssdae.presets import load_preset
    from dc_ssdae.training.config import RunConfig, lay_over

    training = {
        "preset": PRESET,
        "steps": options.steps,
        "minutes": options.minutes or (None if options.steps else 3.0),
        "seed": options.seed,
        "precision": options.dtype,
        "output": str(options.out),
        # Nothing to save on the way of a few minutes; the end is always saved.
        "checkpoint_every": 10**9,
        "evaluate_every": 10**9,
    }
    data = {"dataset": {"class_path": SAMPLE_PHOTOS, "init_args": {"split": "train"}}, "workers": 0}
    return RunConfig.from_mapping(lay_over(load_preset(PRESET), {"training": training, "data": data}))


def _evaluate(model: "DCSSDAE", photos: list[Any], device: "torch.device") -> "list[PhotoResult]":
    import torch

    from dc_ssdae.data.transforms import resize_shorter_side
    from dc_ssdae.evaluation.reconstruction import measure_photo

    model.to(device=device, memory_format=torch.channels_last)
    # Photos with a shorter side of 256 pixels.
    results = [measure_photo(model, photo.name, resize_shorter_side(photo.pixels, 256)) for photo in photos]
    for result in results:
        baseline = f"bicubic of as many values {result.figures['psnr_bicubic']:.2f} dB"
        say(f"  {result.name}: {result.figures['psnr']:.2f} dB ({baseline})")
    return results


def _report(run: Path, shipped: "list[PhotoResult]", results: "list[PhotoResult]", config: "RunConfig") -> None:
    """Write the report of a run: the photos by the shipped and by its own model, its losses, and facts."""
    from dc_ssdae.evaluation.report.demo import demo_page
    from dc_ssdae.files import write_whole
    from dc_ssdae.timing import describe_machine, machine_line
    from dc_ssdae.training.logging import read_lines

    training, last = config.training, read_lines(run / "metrics.jsonl")[-1]
    facts = (
        f"Trained: preset {PRESET!r}, {counted(last['step'], 'step')} of {counted(training.batch_size, 'crop')} of "
        f"{config.data.image_size} px in {last['seconds'] / 60:.1f} minutes, {training.precision}. "
    )
    page = demo_page(shipped, results, run, facts + machine_line(describe_machine()))
    write_whole(run / "report.html", page)
