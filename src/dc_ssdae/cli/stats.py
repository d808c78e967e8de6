"""`dc-ssdae stats`: measures the mean and standard deviation of a model's latents, for its config.json."""

from dataclasses import dataclass

from dc_ssdae.cli.common import advising_on_batches, load_model, show, table, tell_of_images, writable_model
from dc_ssdae.cli.options import BatchOptions, JsonOptions, ModelOptions
from dc_ssdae.figures import cells
from dc_ssdae.settings import setting


@dataclass(kw_only=True)
class Options(ModelOptions, BatchOptions, JsonOptions):
    """Measure the mean and standard deviation of a model's latents, and write them into its config.json.

    A latent diffusion model normalises latents z by them: per channel as (z - latents_mean) / latents_std, or overall
    as (z - shift_factor) * scaling_factor. They are the statistics of samples from the encoder's Gaussian, computed
    from its moments.

    Args:
        data: images to measure on: a folder of images or shards, or a pattern of shards. If the folder has a subfolder
            train/, its images are used.
        images: largest number of images, spread evenly over the data set.
        no_write: do not change config.json.
    """

    data: str = setting(metavar="ROOT")
    images: int = setting(10_000, at_least=1, metavar="N")
    no_write: bool = setting(False, name="--no-write")


def run(options: Options) -> None:
    """Measure, print and write the statistics."""
    import torch
    from tqdm import tqdm

    from dc_ssdae.card import write_model_card
    from dc_ssdae.data.images import to_model_range
    from dc_ssdae.data.loader import ValidationImages, default_workers
    from dc_ssdae.data.sources import open_sources
    from dc_ssdae.evaluation.statistics import latent_statistics
    from dc_ssdae.latent import DiagonalGaussian
    from dc_ssdae.model_folder import write_latent_statistics

    folder = None if options.no_write else writable_model(options.model, "--no-write only prints")
    model = load_model(options)
    images = ValidationImages(open_sources(options.data, None, None, None).train, options.size, options.images)
    workers = default_workers(1) if options.workers is None else options.workers

    @torch.inference_mode()
    def encode(pixels: torch.Tensor) -> DiagonalGaussian:
        return model.encode(to_model_range(pixels.to(model.device))).latent_dist

    channels, bar = model.config.latent_channels, tqdm(total=len(images), unit="image", leave=False, disable=None)
    with advising_on_batches(options), bar:
        moments, unread, enlarged = latent_statistics(
            encode, images, channels, options.batch, workers, advance=bar.update
        )
    tell_of_images(options.program, options.size, list(unread.values()), enlarged, len(images))
    statistics, broken = moments.statistics(), [image.name for image in unread.values()]
    found = {"images": statistics.count, "broken": broken, "size": options.size, **statistics.settings()}
    found["written"] = None
    try:
        if folder is not None:
            write_latent_statistics(folder, statistics)
            found["written"] = str(folder / "config.json")
            write_model_card(folder)
    finally:  # also where they cannot be written: long work may have gone into them
        show(found, options.json, lambda: table(list(cells(found).items()), "ll"))
