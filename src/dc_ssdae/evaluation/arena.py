"""The arena: any number of autoencoders through one protocol, with what they cost measured side by side."""

import ctypes
import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dc_ssdae.data.loader import ReadingFailed, ValidationImages
from dc_ssdae.evaluation.candidates import Candidate
from dc_ssdae.evaluation.evaluate import (
    Evaluation,
    EvaluationSettings,
    Reconstructed,
    describe_failure,
    evaluate,
    reconstruct_places,
)
from dc_ssdae.evaluation.metric_networks import MetricSuite
from dc_ssdae.evaluation.profile import wait_for
from dc_ssdae.timing import Spread, alternating


@dataclass
class Entry:
    """A candidate in the arena, and what was found.

    Attributes:
        label: what it is called.
        remarks: what to know about it.
        failed: why it has no results; None where it has.
        evaluation: of all images.
        parameters: None where they are not known.
        encode: images per second; None where there is no encoding apart from decoding.
        decode: likewise; of a function from images to images, for all of its work.
        splits: whether encoding and decoding are two things.
        is_baseline: whether it is a codec or plain resizing.
        memory: the largest amount in use while it encodes and decodes a batch, its weights among it, in bytes.
        batch: at which speed and memory were measured.
        shown: reconstructions by place, to be looked at.
    """

    label: str
    remarks: list[str] = field(default_factory=list)
    failed: str | None = None
    evaluation: Evaluation | None = None
    parameters: int | None = None
    encode: Spread | None = None
    decode: Spread | None = None
    splits: bool = True
    is_baseline: bool = False
    memory: int | None = None
    batch: int = 0
    shown: dict[int, Reconstructed] = field(default_factory=dict)

    @property
    def latent_shape(self) -> tuple[int, ...] | None:
        """Of one image's latent, (c, h, w) or (tokens, channels)."""
        return None if self.evaluation is None else self.evaluation.latent_shape

    @property
    def tokens(self) -> int | None:
        """What a diffusion transformer with patches of one latent position sees of an image."""
        shape = self.latent_shape
        return None if shape is None else shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))

    def compression(self, size: int) -> float | None:
        """Image values for each latent value, bits left aside."""
        return None if self.latent_shape is None else 3 * size**2 / int(np.prod(self.latent_shape))


def run_arena(
    openers: Mapping[str, Callable[[], Candidate]],
    images: ValidationImages,
    suite: MetricSuite,
    settings: EvaluationSettings,
    device: torch.device,
    rounds: int = 3,
    show: int = 8,
    advance: Callable[[int], object] | None = None,
    report: Callable[[str, str], object] | None = None,
    debug: bool = False,
) -> list[Entry]:
    """Measure candidates; one that fails is reported in its entry, and the others finish.

    Quality first, one candidate after the other, each on the device for its turn alone; then speed, in rounds that go
    through the candidates forwards and backwards in turn, so that a busy machine hinders all of them alike.

    Args:
        openers: by label, what gives a candidate on the CPU.
        images: as `settings.images` gives them.
        suite: of the settings' protocol.
        settings: see there.
        device: of candidates and metrics.
        rounds: in which speed is measured; the median counts.
        show: how many images are kept to be looked at, evenly spread.
        advance: called with the number of images after each batch of each candidate.
        report: called with label and reason when a candidate fails.
        debug: print tracebacks of failures.

    Returns:
        The entries, in the order of the openers.

    Raises:
        ReadingFailed: no image can be read, or the data set can no longer be read.
    """
    entries = {label: Entry(label) for label in openers}
    candidates: dict[str, Candidate] = {}
    places = shown_places(len(images), show)

    def attempt(label: str, work: Callable[[], None]) -> None:
        try:
            work()
        except ReadingFailed:  # the images, not a candidate, are at fault
            raise
        except Exception as error:  # a user's code, or diffusers', may raise anything
            if debug:
                traceback.print_exception(error)
            entries[label].failed = describe_failure(error, settings.batch_size)
            failed = candidates.pop(label, None)
            if failed is not None:
                with suppress(Exception):  # whoever gave it may hold it still: the device is the next one's
                    failed.to(torch.device("cpu"))
            if report is not None:
                report(label, entries[label].failed or "")
        if entries[label].failed is not None:
            gc.collect()  # only here, where the error is gone, and with it its frames and all that they hold

    for label, opener in openers.items():
        entry = entries[label]

        def measure_quality(opener: Callable[[], Candidate] = opener, entry: Entry = entry) -> None:
            candidate = opener()
            entry.remarks = list(candidate.remarks)
            entry.parameters = candidate.count_parameters()
            entry.splits, entry.is_baseline = candidate.splits, candidate.is_baseline
            candidates[entry.label] = candidate
            candidate.to(device)
            entry.evaluation = evaluate(candidate, images, suite, settings, device, advance=advance)
            shown = reconstruct_places(candidate, images, places, settings, device)
            entry.shown = {image.place: image for image in shown}
            candidate.to(torch.device("cpu"))

        attempt(label, measure_quality)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the caching allocator has kept in this one's sizes, before the next

    if not candidates:
        return list(entries.values())
    x = _speed_batch(images, settings).to(device)
    seconds: dict[str, list[tuple[float, float]]] = {label: [] for label in candidates}
    for round_ in range(-1, rounds):
        labels = list(candidates)
        for index in alternating(len(labels), round_):
            label = labels[index]

            def measure_speed(label: str = label, first: bool = round_ < 0) -> None:
                candidate = candidates[label].to(device)
                if first:  # apart from timing
                    entries[label].memory = peak_memory(candidate, partial(candidate.reconstruct, x), device)
                    entries[label].batch = len(x)
                else:
                    seconds[label].append(_time(candidate, x, device))
                candidate.to(torch.device("cpu"))

            attempt(label, measure_speed)
    for label in candidates:
        speeds = [[len(x) / taken for taken in part] for part in zip(*seconds[label], strict=True)]
        entries[label].encode = Spread.of(speeds[0]) if entries[label].splits else None
        entries[label].decode = Spread.of(speeds[1])
    return list(entries.values())


def shown_places(count: int, show: int) -> list[int]:
    """Places of the images to look at, evenly spread."""
    shown = min(show, count)
    return [place * count // shown for place in range(shown)]


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
    module = candidate.module()
    tensors = [] if module is None else [*module.parameters(), *module.buffers()]
    own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before + own
    if device.type != "cpu" or not _reset_high_water_mark():
        work()
        return None
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before) + own


def _reset_high_water_mark() -> bool:
    """Give freed memory back to the system and reset the mark; whether that is possible here."""
    if sys.platform != "linux":
        return False
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        _status("VmHWM")
    except (OSError, LookupError):
        return False
    return True


def _status(key: str) -> int:
    """A value of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


@torch.inference_mode()
def _time(candidate: Candidate, x: Tensor, device: torch.device) -> tuple[float, float]:
    """Seconds that encoding and decoding a batch take; on a GPU after a run that takes memory and chooses kernels."""
    if device.type != "cpu":
        candidate.reconstruct(x)
    wait_for(device)
    start = time.perf_counter()
    encoded = candidate.encode(x)
    wait_for(device)
    between = time.perf_counter()
    candidate.decode(candidate.latent(encoded, None))
    wait_for(device)
    return between - start, time.perf_counter() - between


def _speed_batch(images: ValidationImages, settings: EvaluationSettings) -> Tensor:
    """A batch of the images that can be read, as the model sees them."""
    found: list[Tensor] = []
    for place in range(len(images)):
        image = images[place]
        if image.broken is None:
            found.append(settings.protocol.model_input(image.pixels))
        if len(found) == settings.batch_size:
            break
    return torch.stack(found)
