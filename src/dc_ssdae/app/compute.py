"""What the page computes: a photo through a model, its latent, and the states of the decode. Knows no layout."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dc_ssdae.autoencoder import DCSSDAE
from dc_ssdae.data.images import read_bytes, read_image_bytes, to_model_range, to_uint8
from dc_ssdae.data.loader import resize_and_crop
from dc_ssdae.decoding import DESCENTS, ONE_STEP
from dc_ssdae.errors import InputError, check_names, counted, prefixed
from dc_ssdae.evaluation.candidates import Candidate, CandidateSpec, OurCandidate, open_candidate
from dc_ssdae.evaluation.curves import COLOURS, number_logarithmic_ticks
from dc_ssdae.evaluation.estimates import Estimate
from dc_ssdae.evaluation.evaluate import describe_failure
from dc_ssdae.evaluation.metrics import psnr
from dc_ssdae.evaluation.profile import latent_shape, wait_for
from dc_ssdae.samplers.euler import times_of
from dc_ssdae.samplers.result import root_mean_square
from dc_ssdae.settings import LARGEST_SEED, check_settings, setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How a photo is reconstructed.

    Args:
        size: side in pixels to which the photo is resized and cropped.
        sampler: one that the model's dynamics has.
        steps: number of steps, or the largest number with a tolerance; one_step has none.
        tolerance: at which a descent stops; 0 takes all steps.
        seed: of the noise that the decode starts from.

    Raises:
        InputError: one of them is out of range.
    """

    size: int = setting(256, at_least=1, at_most=2048)
    sampler: str = ONE_STEP
    steps: int = setting(4, at_least=1, at_most=64)
    tolerance: float = setting(0.0, at_least=0.0)
    seed: int = setting(0, at_least=0, at_most=LARGEST_SEED)

    def __post_init__(self) -> None:
        check_settings(self, "")

    def decoding(self) -> dict[str, Any]:
        """What `DCSSDAE.decode` takes; of steps and tolerance, those that the sampler has."""
        steps = {} if self.sampler == ONE_STEP else {"num_steps": self.steps}
        tolerance = self.tolerance if self.tolerance and self.sampler in DESCENTS else None
        return {"sampler": self.sampler, **steps, "tolerance": tolerance}


class State(NamedTuple):
    """A state of a decode, uint8 (3, S, S): its PSNR in dB, and the root mean square of the field there.

    The latter is NaN at the end of flow matching, where no velocity is evaluated.
    """

    pixels: Tensor
    psnr: float
    residual: float


class Channel(NamedTuple):
    """A channel of a latent, uint8 (3, h, w), grey from its smallest value to its largest; and its statistics."""

    pixels: Tensor
    mean: float
    std: float


@dataclass
class Reconstruction:
    """A photo through a model.

    Args:
        original: uint8 (3, S, S), as the model gets it.
        image: of the same shape.
        psnr: in dB.
        encode_seconds: of one run.
        decode_seconds: likewise; of a function from images to images, for all of its work.
        latent: without the batch, (c, h, w) of most models; None of a codec or a function.
        bits: of a codec's file.
        evaluations: of the decoder; None where it does not count them.
        remarks: what to know about the model, or the decode.
        states: from the noise to the image, where they were asked for and the model has them.
    """

    original: Tensor
    image: Tensor
    psnr: float
    encode_seconds: float
    decode_seconds: float
    latent: Tensor | None = None
    bits: int | None = None
    evaluations: int | None = None
    remarks: list[str] = field(default_factory=list)
    states: list[State] = field(default_factory=list)

    def facts(self) -> list[str]:
        """PSNR, times, evaluations, the latent's shape or the file's size, and remarks, each a few words."""
        facts = [f"PSNR {Estimate(self.psnr).text(2)} dB"]
        facts.append(f"encoded in {_in_ms(self.encode_seconds)}, decoded in {_in_ms(self.decode_seconds)}")
        facts += [] if self.evaluations is None else [f"{counted(self.evaluations, 'evaluation')} of the decoder"]
        facts += [] if self.latent is None else [f"latent {'×'.join(map(str, self.latent.shape))}"]
        facts += [] if self.bits is None else [f"{self.bits / math.prod(self.original.shape[1:]):.2f} bits per pixel"]
        return [*facts, *self.remarks]


def _in_ms(seconds: float) -> str:
    return f"{1000 * seconds:,.{0 if seconds > 0.01 else 1}f} ms"


class Models:
    """The models of a page, each loaded when it is first asked for.

    Args:
        specs: what the user named.
        device: where they compute.
        dtype: of their networks.
        classes: of the user's own that a saved model names.
    """

    def __init__(
        self,
        specs: Sequence[CandidateSpec],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        classes: Sequence[type] = (),
    ) -> None:
        self.specs = {spec.label: spec for spec in specs}
        self.device, self.dtype, self.classes = torch.device(device), dtype, classes
        self._opened: dict[str, Candidate] = {}

    def open(self, label: str) -> Candidate:
        """Load a model, once.

        Raises:
            InputError: there is no such model, or it cannot be loaded.
        """
        check_names("model", [label], self.specs)
        if label not in self._opened:
            with prefixed(label):
                self._opened[label] = open_candidate(self.specs[label], self.dtype, self.classes).to(self.device)
        return self._opened[label]

    @torch.inference_mode()
    def reconstruct(self, label: str, pixels: Tensor, settings: Settings, traced: bool = False) -> Reconstruction:
        """Encode and decode a photo.

        Args:
            label: of the model.
            pixels: uint8 (3, S, S).
            settings: of the decode, for a model of this package; others have none.
            traced: also give the states, for which the field is evaluated once more at each.

        Raises:
            InputError: the model cannot be loaded, or fails; says why in a line.
        """
        candidate = self.open(label)
        with _failing_in_a_line(label):
            x = to_model_range(pixels)[None].to(self.device)
            ours = candidate.value if isinstance(candidate, OurCandidate) else None
            if ours is not None:
                latent_shape(ours, *pixels.shape[1:])  # refuses a size that does not fit
            encoded, encode_seconds = self._timed(lambda: candidate.encode(x))
            latent, remarks, states = candidate.latent(encoded, None), list(candidate.remarks), []
            if ours is not None:
                drawn = torch.Generator().manual_seed(settings.seed)  # on the CPU: the same noise on every device
                decoding = {**settings.decoding(), "generator": drawn, "return_trajectory": traced}
                output, decode_seconds = self._timed(lambda: ours.decode(latent, **decoding))
                images, counts = output.sample, output.num_evaluations
                remarks += ["diverged: this is the best state it had"] if output.diverged[0] else []
                # A descent that has stopped only repeats its last state.
                states = _trace(ours, latent, output.trajectory[: int(counts[0]) + 1], pixels) if traced else []
            else:
                (images, counts), decode_seconds = self._timed(lambda: candidate.decode(latent))
            if images.shape != x.shape:
                given, wanted = ("×".join(map(str, part.shape[2:])) for part in (images, x))
                raise InputError(f"gives {given} pixels for {wanted}; choose a size that is a multiple of its factor")
            image, evaluations = to_uint8(images[0]).cpu(), None if counts is None else int(counts[0])
            return Reconstruction(
                original=pixels,
                image=image,
                psnr=psnr(pixels, image),
                encode_seconds=encode_seconds,
                decode_seconds=decode_seconds,
                latent=None if encoded.posterior is None else latent[0].float().cpu(),
                bits=None if encoded.bits is None else encoded.bits[0],
                evaluations=evaluations,
                remarks=remarks,
                states=states,
            )

    def _timed(self, work: Callable[[], T]) -> tuple[T, float]:
        start = time.perf_counter()
        result = work()
        wait_for(self.device)
        return result, time.perf_counter() - start


@contextmanager
def _failing_in_a_line(label: str) -> Iterator[None]:
    """Turn whatever diffusers' code, or a user's, raises into a line."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{label}: {describe_failure(error, 1)}") from error


def _trace(model: DCSSDAE, z: Tensor, trajectory: Tensor, original: Tensor) -> list[State]:
    """Measure states (steps + 1, 1, 3, S, S) of a decode."""
    states, steps = [], len(trajectory) - 1
    for step, x in enumerate(trajectory):
        timed = model.dynamics.conditions_on_time
        now = times_of(steps)[step] if timed else None
        residual = math.nan if timed and step == steps else float(root_mean_square(model.field(x, z, now))[0])
        pixels = to_uint8(x[0].nan_to_num()).cpu()
        states.append(State(pixels, psnr(original, pixels), residual))
    return states


def read_photo(path: str | Path | None, size: int) -> Tensor:
    """Read a photo, resize it by its shorter side and cut out the centre: uint8 (3, size, size).

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if path is None:
        raise InputError("there is no photo yet; drop one, or pick an example")
    return resize_and_crop(read_image_bytes(read_bytes(path), Path(path).name).pixels, size)


def channels(latent: Tensor, most: int = 64) -> list[Channel]:
    """Make pictures of the first channels of a latent (c, h, w); none of one with another shape."""
    if latent.ndim != 3:
        return []
    found = []
    for values in latent[:most]:
        low, high = values.aminmax()
        grey = (255 * (values - low) / (high - low).clamp(min=1e-12)).round().byte()
        found.append(Channel(grey.expand(3, -1, -1), float(values.mean()), float(values.std(correction=0))))
    return found


def descent_figure(states: Sequence[State], name: str) -> "Figure":
    """Draw "psnr", from the first step on, or "residual" of the states of a decode against the step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(3.4, 2.1), layout="constrained")
    axes = figure.add_subplot(xlabel="step")
    if name == "psnr":  # the start's is so low that nothing else could be told apart
        axes.plot(range(1, len(states)), [state.psnr for state in states[1:]], "o-", color=COLOURS[0], markersize=4)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_title("PSNR (dB)")
    else:
        axes.plot([state.residual for state in states], "o-", color=COLOURS[1], markersize=4)
        axes.set(title="RMS of the field", yscale="log")
        number_logarithmic_ticks(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(alpha=0.25)
    return figure
