"""What a reader must know before comparing figures: the protocol in words, and what may not be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dc_ssdae.data.loader import enlarged_caveat
from dc_ssdae.errors import counted
from dc_ssdae.evaluation.candidates import RANDOM_WEIGHTS
from dc_ssdae.evaluation.estimates import METRICS, Estimate
from dc_ssdae.evaluation.evaluate import EvaluationSettings
from dc_ssdae.evaluation.metric_networks import NOT_ASKED, MetricSuite

ENOUGH_IMAGES = 10_000
"""Below them a distance between sets says more about how many images there are than about the model."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """How figures were measured, which every report tells.

    Args:
        settings: of the evaluation.
        suite: its metrics.
        data: name of the data set.
        total: images of the data set.
        machine: as `describe_machine` gives it.
        command: that made the report.
        dtype: of the networks.
        decoding: how models of this package decode, where that is not their default.
    """

    settings: EvaluationSettings
    suite: MetricSuite
    data: str
    total: int
    machine: Mapping[str, Any]
    command: str
    dtype: str
    decoding: Mapping[str, Any] = field(default_factory=dict)

    def protocol_settings(self) -> dict[str, Any]:
        """The protocol, and what else figures depend on, for a file."""
        return {
            **self.settings.protocol.settings(),
            "size": self.settings.size,
            "data": self.data,
            "seed": self.settings.seed,
            "weights": self.suite.files,
            "decoding": dict(self.decoding),
        }


def protocol_lines(
    settings: EvaluationSettings, suite: MetricSuite, data: str, images: int, broken: int, total: int
) -> list[str]:
    """Say how figures were measured.

    Args:
        settings: of the evaluation.
        suite: its metrics.
        data: name of the data set.
        images: how many were measured.
        broken: how many could not be read.
        total: of the data set.
    """
    protocol = settings.protocol
    which = f"all {counted(total, 'image')} of {data}"
    if images + broken != total:
        which = f"{images + broken:,} of the {counted(total, 'image')} of {data}, evenly spread"
    lines = [f"Protocol {protocol.name}. Data: {which}."]
    if broken:
        lines.append(f"{counted(broken, 'image')} of them cannot be read: left out of everything.")
    lines += protocol.sentences(settings.size)
    for name in ("rfid", "rfdd"):
        if name in suite.distances:
            network = "Inception of FID (torch-fidelity)" if name == "rfid" else "DINOv2-L/14, class token (timm)"
            lines.append(
                f"{METRICS[name].title}: Fréchet distance (torchmetrics) on features of {network}, between the "
                f"reconstructions and the same {images:,} processed images, never statistics of the training set."
            )
    for name, file in suite.files.items():
        lines.append(f"Weights of {METRICS[name].title}: {file}.")
    lines.append(
        "Intervals: 95 %, by resampling images with replacement; of distances between sets, ± t · s over replicates of "
        "a Poisson bootstrap. They tell how much another draw of images would change a figure, not another training."
    )
    return lines


def decoding_lines(decoding: Mapping[str, Any]) -> list[str]:
    """Say how models of this package decode, where that is not in one step."""
    settings = ", ".join(f"{name} {value}" for name, value in decoding.items())
    return [f"Models of this package decode with {settings}."] if settings else []


def missing_lines(suite: MetricSuite) -> list[str]:
    """Say which metrics were not taken, and why."""
    return [f"No {METRICS[name].title}: {reason}." for name, reason in suite.missing.items() if reason != NOT_ASKED]


def caveats(
    settings: EvaluationSettings,
    suite: MetricSuite,
    metrics: Sequence[Mapping[str, Estimate]],
    images: int,
    random_models: Sequence[str] = (),
    enlarged: int = 0,
) -> list[str]:
    """Say what may not be compared.

    Args:
        settings: of the evaluation.
        suite: its metrics.
        metrics: of each model that has results.
        images: how many were measured.
        random_models: labels of those with random weights.
        enlarged: how many of the images were smaller than the evaluation's size.
    """
    lines = []
    if random_models:
        names, verb = ", ".join(random_models), "has" if len(random_models) == 1 else "have"
        lines.append(f"{names} {verb} {RANDOM_WEIGHTS}: cost and shape can be compared, quality means nothing.")
    lines += [f"{METRICS[name].title}: {note}." for name, note in suite.notes.items()]
    taken = [name for name in suite.distances if any(found[name].value is not None for found in metrics)]
    if taken and images < ENOUGH_IMAGES:
        titles = " and ".join(METRICS[name].title for name in taken)
        lines.append(
            f"{titles} of {counted(images, 'image')}: these distances fall as images are added, so compare them only "
            f"with those of the same {images:,}; published ones are of 50,000."
        )
    lines += enlarged_caveat(enlarged, images, settings.size)
    lines.append(
        f"Figures are of {settings.size} px images under the protocol {settings.protocol.name}: not comparable with "
        "those of another size or protocol."
    )
    return lines
