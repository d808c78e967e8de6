"""The arena: any number of autoencoders through one protocol, with what they cost measured side by side."""

import ctypes
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from dc_ssdae.data.loader import ReadingFailed, ValidationImages
from dc_ssdae.evaluation.candidates import Candidate
from dc_ssdae.evaluation.estimates import Estimate
from dc_ssdae.evaluation.evaluate import (
    Evaluation,
    EvaluationSettings,
    Reconstructed,
    describe_failure,
    evaluate,
    reconstruct_places,
)
from dc_ssdae.evaluation.metric_networks import MetricSuite
from dc_ssdae.evaluation.profile import timed
from dc_ssdae.timing import measure_alternately


@dataclass
class Entry:
    """A candidate in the arena, and what was found.

    Attributes:
        label: what it is called.
        candidate: itself.
        failed: why it has no results; None where it has.
        evaluation: of all images.
        encode: images per second, with quartiles; None where there is no encoding apart from decoding.
        decode: likewise; of a function from images to images, for all of its work.
        memory: the largest amount in use while it encodes and decodes a batch, its weights among it, in bytes.
        shown: reconstructions by place, to be looked at.
        more: figures that were found elsewhere, by their columns' names.
    """

    label: str
    candidate: Candidate
    failed: str | None = None
    evaluation: Evaluation | None = None
    encode: Estimate | None = None
    decode: Estimate | None = None
    memory: int | None = None
    shown: dict[int, Reconstructed] = field(default_factory=dict)
    more: dict[str, Estimate] = field(default_factory=dict)

    @property
    def tokens(self) -> int | None:
        """What a diffusion transformer with patches of one latent position sees of an image."""
        shape = None if self.evaluation is None else self.evaluation.latent_shape
        return None if shape is None else shape[0] if len(shape) == 2 else math.prod(shape[1:])


def run_arena(
    entries: Sequence[Entry],
    images: ValidationImages,
    suite: MetricSuite,
    settings: EvaluationSettings,
    device: torch.device,
    rounds: int,
    show: int,
    advance: Callable[[int], object],
    report: Callable[[str, str], object],
) -> None:
    """Measure candidates; one that fails is reported in its entry, and the others finish.

    Quality first, one candidate after the other, each on the device for its turn alone; then speed, in rounds that go
    through the candidates forwards and backwards in turn, so that a busy machine hinders all of them alike.

    Args:
        entries: candidates on the CPU, to be measured.
        images: as `settings.images` gives them.
        suite: of the settings' protocol.
        settings: see there.
        device: of candidates and metrics.
        rounds: in which speed is measured; the median counts.
        show: how many images are kept to be looked at, evenly spread.
        advance: called with the number of images after each batch of each candidate.
        report: called with label and reason when a candidate fails, while its exception is handled.

    Raises:
        ReadingFailed: no image can be read, or the data set can no longer be read.
    """
    shown = min(show, len(images))
    places = [place * len(images) // shown for place in range(shown)]

    @contextmanager
    def turn_of(entry: Entry) -> Iterator[None]:
        """Have a candidate on the device; where it raises, its entry says why."""
        gc.collect()  # an error, and with it its frames and all that they hold on the device
        torch.cuda.empty_cache()  # what the caching allocator has kept in other candidates' sizes
        try:
            entry.candidate.to(device)
            yield
        except ReadingFailed:  # the images, not a candidate, are at fault
            raise
        except Exception as error:  # a user's code, or diffusers', may raise anything
            entry.evaluation, entry.shown = None, {}
            entry.failed = describe_failure(error, settings.batch_size)
            report(entry.label, entry.failed)
        finally:
            with suppress(Exception):  # where the device has failed
                entry.candidate.to(torch.device("cpu"))

    for entry in entries:
        with turn_of(entry):
            entry.evaluation = evaluate(entry.candidate, images, suite, settings, device, advance=advance)
            found = reconstruct_places(entry.candidate, images, places, settings, device)
            entry.shown = {image.place: image for image in found}

    read = (images[place] for place in range(len(images)))
    usable = islice((image for image in read if image.broken is None), settings.batch_size)
    x = torch.stack([settings.protocol.model_input(image.pixels) for image in usable]).to(device)

    def measure_costs(entry: Entry) -> tuple[float, float]:
        """Measure how many images per second are encoded and decoded, and the memory that it takes."""
        if entry.evaluation is not None:
            with turn_of(entry), torch.inference_mode():
                candidate = entry.candidate
                entry.memory = entry.memory or peak_memory(candidate, partial(candidate.reconstruct, x), device)
                encoded, encode_seconds = timed(partial(candidate.encode, x), device, 1)
                latent = candidate.latent(encoded, None)
                _, decode_seconds = timed(partial(candidate.decode, latent), device, 1)
                return len(x) / encode_seconds, len(x) / decode_seconds
        return math.nan, math.nan

    speeds = measure_alternately([partial(measure_costs, entry) for entry in entries], rounds)
    for entry, own in zip(entries, speeds, strict=True):
        if entry.evaluation is not None:
            encode, decode = (Estimate(*np.percentile(half, [50, 25, 75]).tolist()) for half in zip(*own, strict=True))
            splits = entry.candidate.splits
            entry.encode = encode if splits else None
            entry.decode = decode if splits else replace(decode, note="encoding and decoding in one")


@torch.inference_mode()
def peak_memory(candidate: Candidate, work: Callable[[], object], device: torch.device) -> int | None:
    """The largest amount of memory in use while a candidate works, its weights among it.

    On a CUDA device PyTorch's allocated memory; on the CPU of Linux the process's resident set, whose high-water mark
    the kernel resets on request.

    Args:
        candidate: on the device.
        work: encodes a batch, for example, decodes it, or both.
        device: of the candidate.

    Returns:
        Bytes; None where the device does not tell.
    """
    module = candidate.module
    own = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before + own
    mark: int | None = None
    with suppress(OSError, LookupError):  # Linux alone tells
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the mark
        mark = _high_water_mark()
    work()
    return None if mark is None or device.type != "cpu" else max(0, _high_water_mark() - mark) + own


def _high_water_mark() -> int:
    """The most bytes of this process that were resident."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)["VmHWM"].split()[0])
