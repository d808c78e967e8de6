"""What a run trains: an autoencoder, on crops of images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from dc_ssdae.data.loader import Batch, BrokenImage, TrainingSamples
from dc_ssdae.data.sources import ImageSources
from dc_ssdae.model_folder import NOT_MEASURED, read_config
from dc_ssdae.training.build import load_step, place_step
from dc_ssdae.training.checkpoint import Checkpoint
from dc_ssdae.training.config import RunConfig
from dc_ssdae.training.logging import Loggers, read_lines
from dc_ssdae.training.loop import TrainingFailed, TrainingLoop
from dc_ssdae.training.measurements import Measurements
from dc_ssdae.training.origin import origin
from dc_ssdae.training.step import TrainingStep, draw_noise


@dataclass(eq=False)
class Trainer(TrainingLoop):
    """The run of an autoencoder in one of its processes; `sources` are its images."""

    config: RunConfig
    sources: ImageSources
    measurements: Measurements = field(init=False)
    forward_methods: ClassVar[tuple[str, ...]] = ("reconstruct", "posterior")

    def build(self, checkpoint: Checkpoint | None, sharded: bool) -> TrainingStep:
        module = load_step(self.config, self.run_folder, checkpoint)
        place_step(module, self.config, self.accelerator.device, sharded)
        return module

    def prepare(self) -> Measurements:
        config, run = self.config, self.run_folder
        model_config = read_config(run.model) if (run.model / "config.json").is_file() else {}
        known = any(model_config.get(name, unknown) != unknown for name, unknown in NOT_MEASURED.items())
        stays = known and self.module.keeps_latent
        self._broken = {line["name"] for line in read_lines(run.broken_images) if line["split"] == "train"}
        random = self.module.objective.random_backbones
        self.remarks = {"random_backbones": random} if random else {}
        self._origin = origin(config, model_config.get("provenance"), len(self.sources.train), random)
        return Measurements(self, config.training.latent_statistics > 0 and not stays)

    def samples(self) -> TrainingSamples:
        data, training = self.config.data, self.config.training
        repeat_after = None if self.config.distillation is None else self.config.distillation.cache_steps
        crop = data.image_size, data.aug_scale, data.flip
        return TrainingSamples(self.sources.train, training.seed, training.batch_size, *crop, repeat_after)

    def arguments(self, batch: Batch) -> Sequence[Tensor | None]:
        training, device = self.config.training, self.accelerator.device
        settings = self.config.data.image_size, training.seed, training.batch_size
        noise = draw_noise(self.module.model, *settings, batch.draw.tolist(), device, training.latent_noise)
        return batch.pixels.to(device, non_blocking=True), *noise, batch.draw

    def own_state(self) -> dict[str, Any]:
        provenance = {**self._origin, "steps": self.step, "evaluations": self.measurements.evaluations}
        return {"provenance": provenance, "keeps_latent": self.module.keeps_latent}

    def report_broken(self, mine: list[BrokenImage], loggers: Loggers) -> None:
        """Name what could not be read, and give up where that is too much."""
        for images in self.processes.gather(mine):
            loggers.broken(images, self.step, "train")
            self._broken.update(image.name for image in images)
        broken, count = len(self._broken), len(self.sources.train)
        if broken > self.config.data.max_broken_share * count:
            raise TrainingFailed(f"{broken} of {count} training images cannot be read, more than data.max_broken_share")
