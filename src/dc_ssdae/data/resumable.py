"""A folder that a command fills shard by shard: begun with certain settings, continued, and finished."""

import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dc_ssdae.distributed import Processes
from dc_ssdae.errors import InputError, counted
from dc_ssdae.files import check_file, sha256, sync, write_whole, written_beside

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class ShardCommand:
    """A command that writes shards into a folder, with a report on each, and a manifest as the last thing.

    Args:
        name: of the command; until it has finished, its folder holds a hidden one of that name with its reports.
        manifest_format: what its manifests state as their format, in version 1.
        suffix: of a shard's name.
    """

    name: str
    manifest_format: str
    suffix: str

    def check_finished(self, folder: str | Path) -> None:
        """Refuse a folder that the command has begun and not finished.

        Raises:
            InputError: the command is at work there, or was interrupted.
        """
        if Path(folder, f".{self.name}").is_dir() and not Path(folder, MANIFEST_FILE).exists():
            raise InputError(f"dc-ssdae {self.name} has not finished with {str(folder)!r}; run the same command again")


@dataclass
class ShardWriter(ABC):
    """Writes the shards of one part of a data set, those that are missing, and its manifest.

    A shard is finished when it and its report are there, and the report states the shard's size as `bytes`.

    Args:
        command: that writes them.
        folder: to write to; made if need be, and otherwise empty or begun with the same settings.
        total: how many images there are.
        shard_size: images in a shard, at most.
        batch_size: images read at a time, at most.
        max_broken_share: the largest share of broken images that is accepted.
        report: gets a line for each broken image, and where everything is finished already.
    """

    command: ShardCommand
    folder: Path
    total: int
    shard_size: int
    batch_size: int
    max_broken_share: float
    report: Callable[[str], None]

    @cached_property  # what is found before the images are read holds for all of them
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The settings, and what identifies the images; JSON."""

    @abstractmethod
    def read(self, places: Sequence[int]) -> Iterator[Any]:
        """Read the images at some places, in batches that end where a shard ends."""

    @abstractmethod
    def write(self, path: Path, images: Iterable[Any], advance: Callable[[int], object]) -> dict[str, Any]:
        """Write a shard, and give its report: `images`, their number, `broken`, names and reasons, and others; JSON.

        Args:
            path: to write to.
            images: the shard's batches.
            advance: gets the number of images of each batch.
        """

    @abstractmethod
    def content(self, reports: Sequence[dict[str, Any]], broken: Sequence[dict[str, str]]) -> dict[str, Any]:
        """What the manifest states of all shards together, by their reports, besides the shards themselves."""

    def _places(self, number: int) -> tuple[Path, Path]:
        """Where a shard lies, and its report until all shards are written."""
        report = self.folder / f".{self.command.name}" / f"{number:06d}.json"
        return self.folder / f"{number:06d}{self.command.suffix}", report

    def begin(self) -> dict[str, Any] | None:
        """Prepare the folder; gives the manifest if everything is finished.

        Raises:
            InputError: the folder holds something else, was begun with something else, or is damaged.
        """
        folder, identity, command = self.folder, self.identity, self.command
        state = folder / f".{command.name}"
        settings_path, manifest_path = state / "settings.json", folder / MANIFEST_FILE
        manifest = read_json(manifest_path) if manifest_path.exists() else {}
        is_finished = manifest.get("format") == command.manifest_format
        if not is_finished and not any(state.glob("[0-9]*.json")):
            foreign = {path.name for path in folder.glob("*")} - {state.name, f".{command.name}.lock"}
            if foreign and not settings_path.exists():
                raise InputError(f"the destination {str(folder)!r} holds {min(foreign)!r}; choose an empty folder")
            write_whole(settings_path, to_json(identity))
        begun = manifest["settings"] if is_finished else read_json(settings_path)
        for name, value in identity.items():
            if begun.get(name, value) != value:
                kind = name.removesuffix("_sha256")  # names, files (by size and time), classes, model
                what = f"{name} {begun[name]}, not {value}" if kind == name else f"different {kind}"
                raise InputError(f"{str(folder)!r} was begun with {what}; choose another destination")
        for path in folder.glob(".*.partial"):  # of killed processes
            path.unlink(missing_ok=True)
        if not is_finished:
            return None
        for shard in manifest["shards"]:
            path = folder / shard["name"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise InputError(f"shard {str(path)!r} is missing or damaged; delete {str(folder)!r} and run it again")
        shutil.rmtree(state, ignore_errors=True)  # still there if it was killed just before removing it
        self.report(f"{str(folder)!r} is finished already; nothing to do")
        return manifest

    def run(self, name: str, processes: Processes) -> dict[str, Any]:
        """Write this process's share of the missing shards and, in the main one, the manifest; gives the manifest."""
        from tqdm import tqdm

        missing = [number for number, report in enumerate(processes.on_main(self._reports)) if not report]
        own = [missing[place] for place in processes.share(len(missing))]
        broken: list[tuple[str, str]] = []

        places = [range(self.total)[number * self.shard_size :][: self.shard_size] for number in own]
        images, shards = self.read([*chain(*places)]), zip(own, places, strict=True)

        def write_next() -> None:
            for number, shard in islice(shards, 1):  # none, where only others have one left
                path, report_path = self._places(number)
                with written_beside(path) as beside:
                    batches = islice(images, -(-len(shard) // self.batch_size))
                    report = {"name": path.name, **self.write(beside, batches, bar.update)}
                    sync(beside)
                    report |= {"bytes": beside.stat().st_size, "sha256": sha256(beside)}
                    write_whole(report_path, to_json(report))
                for image, reason in report["broken"]:
                    broken.append((image, reason))
                    self.report(f"left out: {reason if image in reason else f'{image}: {reason}'}")
            check_broken(broken, self.total, self.max_broken_share)

        hidden, size = not processes.is_main or None, sum(map(len, places))
        with tqdm(total=size, unit="image", desc=name or None, disable=hidden) as bar:
            for _ in range(0, len(missing), processes.count):  # together: what fails in one process ends all
                processes.together(write_next)
        return processes.on_main(self._finish)

    def _reports(self) -> list[dict[str, Any]]:
        """The report on each shard; nothing on one that is not finished."""
        reports = []
        for number in range(-(-self.total // self.shard_size)):
            shard, path = self._places(number)
            report = read_json(path) if shard.is_file() and path.is_file() else {}
            reports.append(report if report and report["bytes"] == shard.stat().st_size else {})
        return reports

    def _finish(self) -> dict[str, Any]:
        """Put the reports together and, as the last thing, write the manifest."""
        reports = self._reports()
        if not all(reports):
            raise InputError(f"shards have gone from {str(self.folder)!r}; run the same command again")
        broken = [image for report in reports for image in report["broken"]]
        check_broken(broken, self.total, self.max_broken_share)
        keys = ("name", "images", "bytes", "sha256")
        manifest = {"format": self.command.manifest_format, "version": 1, "settings": self.identity}
        manifest |= self.content(reports, [{"name": name, "reason": reason} for name, reason in broken])
        manifest["shards"] = [{key: report[key] for key in keys} for report in reports]
        write_whole(self.folder / MANIFEST_FILE, to_json(manifest))
        shutil.rmtree(self.folder / f".{self.command.name}")
        return manifest


def write_parts(
    command: ShardCommand, target: Path, writers: Mapping[str, ShardWriter], processes: Processes
) -> dict[str, dict[str, Any]]:
    """Write the shards and manifest of each part, and give the manifests by the parts' names.

    Args:
        command: that writes them.
        target: the folder that holds those of all parts.
        writers: of the parts, by their names.
        processes: that share the work and see the same files.

    Raises:
        InputError: a folder holds something else or was begun with other settings, or too many images are broken.
        OSError: something cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = target / f".{command.name}.lock"
    locked = ExitStack()

    def keep_others_out() -> None:
        target.mkdir(parents=True, exist_ok=True)
        try:
            locked.enter_context(FileLock(lock, blocking=False))
        except Timeout as error:
            raise InputError(f"another dc-ssdae {command.name} is writing to {str(target)!r}") from error
        locked.callback(lock.unlink, missing_ok=True)  # while it is held: no other can lock a file without a name

    with locked:
        processes.on_main(keep_others_out)
        begun = processes.on_main(lambda: [writer.begin() for writer in writers.values()])
        found = zip(writers.items(), begun, strict=True)
        return {name: manifest or writer.run(name, processes) for (name, writer), manifest in found}


def identify(source: Any, names: bytes) -> dict[str, Any]:
    """Hash the names of a source's images, the states of its files, if it has `file_states`, and its classes."""
    states = getattr(source, "file_states", None)
    files = None if states is None else "".join(f"{state}\n" for state in states()).encode()
    classes = "\0".join(source.classes).encode("utf-8", "surrogateescape")
    return {
        f"{kind}_sha256": None if content is None else hashlib.sha256(content).hexdigest()
        for kind, content in (("names", names), ("files", files), ("classes", classes))
    }


def to_json(content: Any) -> bytes:
    """Write JSON in ASCII, so that odd file names survive."""
    return json.dumps(content, indent=1).encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; it is empty if the file holds something else.

    Raises:
        InputError: it cannot be read; names it.
    """
    try:
        check_file(path)
        content = json.loads(path.read_bytes())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from error


def check_places(source: str, target: Path) -> None:
    """Refuse a destination that lies in the source.

    Raises:
        InputError: names the destination.
    """
    if os.path.isdir(source) and target.resolve().is_relative_to(Path(source).resolve()):
        raise InputError(f"the destination {str(target)!r} lies in the source {source!r}; choose a folder outside")


def check_broken(broken: Sequence[tuple[str, str]], total: int, max_broken_share: float) -> None:
    """Refuse too many broken images.

    Args:
        broken: name and reason of each.
        total: how many images there are, broken or not.
        max_broken_share: the largest share that is accepted.

    Raises:
        InputError: says how many there are, and why one of them is broken.
    """
    if len(broken) > max_broken_share * total + 1e-9:
        share = f"more than the share of {max_broken_share:g} that --max-broken-share allows"
        raise InputError(
            f"{len(broken)} of {counted(total, 'image')} are broken, {share}; one of them: {broken[-1][1]}"
        )
