"""A folder that a command fills shard by shard: begun with certain settings, continued, and finished."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dc_ssdae.errors import InputError, counted
from dc_ssdae.files import check_file, write_whole

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class ShardCommand:
    """A command that writes shards into a folder, with a report on each, and a manifest as the last thing.

    Args:
        name: of the command; until it has finished, its folder holds a hidden one of that name with its reports.
        manifest_format: what its manifests state as their format.
        suffix: of a shard's name.
    """

    name: str
    manifest_format: str
    suffix: str

    def shard_path(self, folder: Path, number: int) -> Path:
        """Where a shard lies."""
        return folder / f"{number:06d}{self.suffix}"

    def report_path(self, folder: Path, number: int) -> Path:
        """Where a shard's report lies until all shards are written."""
        return folder / f".{self.name}" / f"{number:06d}.json"

    @contextmanager
    def lock(self, target: Path) -> Iterator[None]:
        """Keep other processes of the same command out of a folder, which is made if need be.

        Raises:
            InputError: one is at work there.
        """
        from filelock import FileLock, Timeout

        target.mkdir(parents=True, exist_ok=True)
        path = target / f".{self.name}.lock"
        try:
            with FileLock(path, blocking=False):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)  # while it is held: no other process can lock a file without a name
        except Timeout as error:
            raise InputError(f"another dc-ssdae {self.name} is writing to {str(target)!r}") from error

    def begin(self, folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Prepare a folder for its shards.

        Args:
            folder: to write to; made if need be, and otherwise empty or begun with the same settings.
            identity: the settings, and what identifies the images; JSON.

        Returns:
            The manifest if everything is finished.

        Raises:
            InputError: the folder holds something else, was begun with something else, or is damaged.
        """
        state = folder / f".{self.name}"
        settings_path, manifest_path = state / "settings.json", folder / MANIFEST_FILE
        manifest = read_json(manifest_path) if manifest_path.exists() else {}
        is_finished = manifest.get("format") == self.manifest_format
        if not is_finished and not any(state.glob("[0-9]*.json")):
            foreign = {path.name for path in folder.glob("*")} - {state.name, f".{self.name}.lock"}
            if foreign and not settings_path.exists():
                raise InputError(f"the destination {str(folder)!r} holds {min(foreign)!r}; choose an empty folder")
            write_whole(settings_path, to_json(identity))
        begun = manifest["settings"] if is_finished else read_json(settings_path)
        for name, value in identity.items():
            if begun.get(name, value) != value:
                kind = name.removesuffix("_sha256")  # names, files (by size and time), classes, model
                what = f"{name} {begun[name]}, not {value}" if kind == name else f"different {kind}"
                raise InputError(f"{str(folder)!r} was begun with {what}; choose another destination")
        for shard in manifest["shards"] if is_finished else ():
            path = folder / shard["name"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise InputError(f"shard {str(path)!r} is missing or damaged; delete {str(folder)!r} and run it again")
        for path in folder.glob(".*.partial"):  # of killed processes
            path.unlink(missing_ok=True)
        if not is_finished:
            return None
        shutil.rmtree(state, ignore_errors=True)  # still there if it was killed just before removing it
        return manifest

    def read_report(self, folder: Path, number: int) -> dict[str, Any] | None:
        """Read the report on a finished shard, which states the shard's size as `bytes`; None if it is not finished."""
        shard, path = self.shard_path(folder, number), self.report_path(folder, number)
        report = read_json(path) if shard.is_file() and path.is_file() else {}
        return report if report and report["bytes"] == shard.stat().st_size else None

    def finish(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, and remove the reports."""
        write_whole(folder / MANIFEST_FILE, to_json(manifest))
        shutil.rmtree(folder / f".{self.name}")

    def check_finished(self, folder: str | Path) -> None:
        """Refuse a folder that the command has begun and not finished.

        Raises:
            InputError: the command is at work there, or was interrupted.
        """
        if Path(folder, f".{self.name}").is_dir() and not Path(folder, MANIFEST_FILE).exists():
            raise InputError(f"dc-ssdae {self.name} has not finished with {str(folder)!r}; run the same command again")


def files_sha256(source: Any) -> str | None:
    """Hash what a source's `file_states` says of its files, to notice changed ones; None if the source has none."""
    states = getattr(source, "file_states", None)
    if states is None:
        return None
    return hashlib.sha256("".join(f"{state}\n" for state in states()).encode()).hexdigest()


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
        raise InputError(
            f"{len(broken)} of {counted(total, 'image')} are broken, more than the share of {max_broken_share:g} that "
            f"--max-broken-share allows; one of them: {broken[-1][1]}"
        )
