"""A folder that a command fills shard by shard: begun with certain settings, gone on with, and finished."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dc_ssdae.data.shard_cache import is_url
from dc_ssdae.data.shard_index import MANIFEST_FILE, remove_partial_files
from dc_ssdae.errors import InputError, counted
from dc_ssdae.files import check_file, write_whole

_SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class ShardCommand:
    """A command that writes shards into a folder, with a report of each, and a manifest as the last thing.

    Args:
        name: of the command; until it has finished, its folder holds a hidden one of that name with its reports.
        manifest_format: what its manifests state as their format.
        suffix: of a shard's name.
    """

    name: str
    manifest_format: str
    suffix: str

    @property
    def unfinished_folder(self) -> str:
        """Name of the folder that lies among the shards until all are written."""
        return f".{self.name}"

    def shard_path(self, folder: Path, number: int) -> Path:
        """Where a shard lies."""
        return folder / f"{number:06d}{self.suffix}"

    def report_path(self, folder: Path, number: int) -> Path:
        """Where a shard's report lies until all shards are written."""
        return folder / self.unfinished_folder / f"{number:06d}.json"

    @contextmanager
    def lock(self, target: Path) -> Iterator[None]:
        """Keep other processes of the same command out of a folder, which is made if need be.

        Raises:
            InputError: one is at work there.
        """
        from filelock import FileLock, Timeout

        target.mkdir(parents=True, exist_ok=True)
        path = target / self._lock_file
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise InputError(f"another dc-ssdae {self.name} is writing to {str(target)!r}") from error
        try:
            yield
        finally:
            # While it is held; who has opened the file already gets no lock on what is no longer in the folder.
            try:
                path.unlink(missing_ok=True)
            finally:
                lock.release()

    def begin(
        self, folder: Path, identity: Mapping[str, Any], parts: set[str], differs: Mapping[str, str]
    ) -> dict[str, Any] | None:
        """Prepare a folder for its shards.

        Args:
            folder: to write to; made if need be, and else empty or begun with the same settings.
            identity: the settings, and what tells the images; JSON.
            parts: names of folders in it that are the command's too.
            differs: what to say, after the folder's name, where one of these entries of `identity` is another.

        Returns:
            The manifest, where all is finished.

        Raises:
            InputError: the folder holds something else, was begun with something else, or is damaged.
        """
        state = folder / self.unfinished_folder
        manifest_path, settings_path = folder / MANIFEST_FILE, state / _SETTINGS_FILE
        if manifest_path.exists():
            manifest = self._finished(manifest_path, identity, differs)
            shutil.rmtree(state, ignore_errors=True)  # it was killed between the manifest and this
            return manifest
        if settings_path.exists() and any(state.glob("[0-9]*.json")):
            _compare(self._read(settings_path), identity, folder, differs)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            ours = {self.unfinished_folder, self._lock_file} | parts
            foreign = sorted(path.name for path in folder.iterdir() if path.name not in ours)
            if foreign and not settings_path.exists():
                raise InputError(f"the destination {str(folder)!r} holds {foreign[0]!r}; choose an empty folder")
            state.mkdir(exist_ok=True)
            write_whole(settings_path, to_json(identity))
        remove_partial_files(folder)
        remove_partial_files(state)
        return None

    def read_report(self, folder: Path, number: int) -> dict[str, Any] | None:
        """The report of a shard that is finished; it states the shard's size as `bytes`."""
        shard, path = self.shard_path(folder, number), self.report_path(folder, number)
        if not shard.is_file() or not path.is_file():
            return None
        report = self._read(path)
        return report if report.get("bytes") == shard.stat().st_size else None

    def finish(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, and remove the reports."""
        write_whole(folder / MANIFEST_FILE, to_json(manifest))
        shutil.rmtree(folder / self.unfinished_folder)

    @property
    def _lock_file(self) -> str:
        return f".{self.name}.lock"

    def _finished(self, path: Path, identity: Mapping[str, Any], differs: Mapping[str, str]) -> dict[str, Any]:
        """The manifest at a path, if the shards beside it are what it lists."""
        folder, manifest = path.parent, self._read(path)
        if manifest.get("format") != self.manifest_format:
            raise InputError(f"{str(path)!r} was not written by dc-ssdae {self.name}; choose an empty folder")
        _compare(manifest.get("settings"), identity, folder, differs)
        try:
            sizes = {folder / shard["name"]: shard["bytes"] for shard in manifest["shards"]}
        except (KeyError, TypeError) as error:
            raise InputError(f"{str(path)!r} is damaged; delete {str(folder)!r} and run the command again") from error
        for shard, size in sizes.items():
            if not shard.is_file() or shard.stat().st_size != size:
                raise InputError(
                    f"shard {str(shard)!r} is missing or damaged; delete {str(folder)!r} and run the command again"
                )
        return manifest

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            check_file(path)
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{str(path)!r} cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise InputError(f"{str(path)!r} is not what dc-ssdae {self.name} writes")
        return content


def _compare(begun: Any, identity: Mapping[str, Any], folder: Path, differs: Mapping[str, str]) -> None:
    begun = begun if isinstance(begun, dict) else dict.fromkeys(identity)
    for name, value in identity.items():
        if begun.get(name, value if name == "files_sha256" else None) == value:  # older versions did not look at files
            continue
        if name in differs:
            raise InputError(f"{str(folder)!r} {differs[name]}; choose another destination")
        raise InputError(
            f"{str(folder)!r} was begun with {name} {begun.get(name)}, not {value}; choose another destination"
        )


def files_sha256(source: Any) -> str | None:
    """The SHA-256 of what is known of a source's files, by which changed ones are told; None of a user's own source."""
    if not callable(states := getattr(source, "file_states", None)):
        return None
    digest = hashlib.sha256()
    for state in states():
        digest.update(f"{state}\n".encode())
    return digest.hexdigest()


def to_json(content: Any) -> bytes:
    """Write JSON in ASCII, so that odd file names survive."""
    return json.dumps(content, indent=1).encode()


def check_places(source: str, target: Path) -> None:
    """Refuse a destination that lies in the source, or is a file.

    Raises:
        InputError: names the destination.
    """
    if not is_url(source) and os.path.isdir(source) and target.resolve().is_relative_to(Path(source).resolve()):
        raise InputError(f"the destination {str(target)!r} lies in the source {source!r}; choose a folder outside")
    if target.exists() and not target.is_dir():
        raise InputError(f"the destination {str(target)!r} is not a folder")


def check_broken(broken: Sequence[tuple[str, str]], total: int, max_broken_share: float) -> None:
    """Refuse too many broken images.

    Args:
        broken: name and reason of each.
        total: how many images there are, broken or not.
        max_broken_share: the largest share that is accepted.

    Raises:
        InputError: tells how many there are, and of one of them why.
    """
    if len(broken) > max_broken_share * total + 1e-9:
        raise InputError(
            f"{len(broken)} of {counted(total, 'image')} are broken, more than the share of {max_broken_share:g} that "
            f"--max-broken-share allows; one of them: {broken[-1][1]}"
        )
