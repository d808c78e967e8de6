"""The arena: any number of autoencoders through one protocol, with what they cost measured side by side."""

import ctypes
import gc
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

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
from dc_ssdae.evaluation.profile import timed
from dc_ssdae.timing import Spread, measure_alternately


@dataclass
class Entry:
    """A candidate in the arena, and what was found.

    Attributes:
        label: what it is called.
        remarks: what to know about it.
        parameters: None where they are not known.
        splits: whether encoding and decoding are two things.
        is_baseline: whether it is a codec or plain resizing.
        failed: why it has no results; None where it has.
        evaluation: of all images.
        encode: images per second; None where there is no encoding apart from decoding.
        decode: likewise; of a function from images to images, for all of its work.
        memory: the largest amount in use while it encodes and decodes a batch, its weights among it, in bytes.
        batch: at which speed and memory were measured.
        shown: reconstructions by place, to be looked at.
    """

    label: str
    remarks: list[str] = field(default_factory=list)
    parameters: int | None = None
    splits: bool = True
    is_baseline: bool = False
    failed: str | None = None
    evaluation: Evaluation | None = None
    encode: Spread | None = None
    decode: Spread | None = None
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
        """Image values per latent value, bits left aside."""
        return None if self.latent_shape is None else 3 * size**2 / int(np.prod(self.latent_shape))


def run_arena(
    candidates: Mapping[str, Candidate],
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
        candidates: by label, on the CPU.
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
        The entries, in the order of the candidates.

    Raises:
        ReadingFailed: no image can be read, or the data set can no longer be read.
    """
    shown = min(show, len(images))
    places = [place * len(images) // shown for place in range(shown)]
    entries = {
        label: Entry(label, candidate.remarks, candidate.count_parameters(), candidate.splits, candidate.is_baseline)
        for label, candidate in candidates.items()
    }

    @contextmanager
    def turn_of(entry: Entry) -> Iterator[None]:
        """Have a candidate on the device; where it raises, its entry says why."""
        gc.collect()  # an error, and with it its frames and all that they hold on the device
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the caching allocator has kept in other candidates' sizes
        try:
            candidates[entry.label].to(device)
            yield
        except ReadingFailed:  # the images, not a candidate, are at fault
            raise
        except Exception as error:  # a user's code, or diffusers', may raise anything
            if debug:
                traceback.print_exception(error)
            entry.failed = describe_failure(error, settings.batch_size)
            if report is not None:
                report(entry.label, entry.failed)
        finally:
            with suppress(Exception):  # where the device has failed
                candidates[entry.label].to(torch.device("cpu"))

    for entry in entries.values():
        with turn_of(entry):
            candidate = candidates[entry.label]
            entry.evaluation = evaluate(candidate, images, suite, settings, device, advance=advance)
            found = reconstruct_places(candidate, images, places, settings, device)
            entry.shown = {image.place: image for image in found}

    finished = [entry for entry in entries.values() if entry.failed is None]
    read = (images[place] for place in range(len(images)))
    usable = islice((image for image in read if image.broken is None), settings.batch_size)
    x = torch.stack([settings.protocol.model_input(image.pixels) for image in usable]).to(device)

    speeds: dict[str, list[tuple[float, float]]] = {entry.label: [] for entry in finished}

    def measure_speed(entry: Entry) -> None:
        """Measure how many images per second are encoded and decoded, and the first time the memory that it takes."""
        if entry.failed is not None:
            return
        with turn_of(entry), torch.inference_mode():
            candidate = candidates[entry.label]
            if not entry.batch:
                entry.memory = peak_memory(candidate, partial(candidate.reconstruct, x), device)
                entry.batch = len(x)
            encoded, encode_seconds = timed(partial(candidate.encode, x), device, 1)
            latent = candidate.latent(encoded, None)
            _, decode_seconds = timed(partial(candidate.decode, latent), device, 1)
            speeds[entry.label].append((len(x) / encode_seconds, len(x) / decode_seconds))

    measure_alternately([partial(measure_speed, entry) for entry in finished], rounds)
    for entry in finished:
        if entry.failed is None:
            encode, entry.decode = map(Spread.of, zip(*speeds[entry.label], strict=True))
            entry.encode = encode if entry.splits else None
    return list(entries.values())


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
    own = 0 if module is None else sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
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
