"""Shards from URLs, kept as files in a cache that several processes may share."""

import hashlib
import os
import re
import shutil
import subprocess
import urllib.parse
from pathlib import Path

from dc_ssdae import files
from dc_ssdae.data.optional import import_optional
from dc_ssdae.errors import InputError

DEFAULT_CACHE = "~/.cache/dc_ssdae/shards"

WEB = ("http://", "https://")
STALL_SECONDS, RETRIES = 60, 4
"""A download is begun again, at most so often, when nothing has come for so long."""


def is_url(text: str) -> bool:
    """Whether a shard's name has to be fetched: "scheme://…" or WebDataset's "pipe:command"."""
    return text.startswith("pipe:") or re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", text) is not None


def check_scheme(url: str) -> None:
    """Refuse URLs that WebDataset has no program for.

    Raises:
        InputError: the scheme is not among those it knows.
    """
    schemes = import_optional("webdataset.gopen").gopen_schemes
    scheme = url.partition(":")[0].lower()
    if scheme not in schemes:
        accepted = ", ".join(sorted(name for name in schemes if name.isalnum()))
        raise InputError(
            f"webdataset cannot fetch {url!r}; accepted: {accepted}, where pipe: takes any command that writes the "
            "shard, such as 'pipe:aws s3 cp s3://bucket/000000.tar -'"
        )


def sibling(url: str, name: str) -> str | None:
    """The URL of another file in the same folder; None for the output of a command."""
    if url.startswith("pipe:"):
        return None
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def cached_file(url: str, cache: str | None, sha256: str | None = None) -> Path:
    """Where the cache has, or will have, what a URL gives.

    Args:
        url: of a shard, or of a file beside shards.
        cache: the cache's folder; None is `DEFAULT_CACHE`.
        sha256: of the content, where it is known: another content has another place.
    """
    place, mark, query = (url, "", "") if url.startswith("pipe:") else url.partition("?")
    folder, _, name = (place, "", "shard.tar") if url.startswith("pipe:") else place.rpartition("/")
    key = hashlib.sha256(f"{folder}{mark}{query}\n{sha256}".encode("utf-8", "surrogateescape")).hexdigest()[:24]
    return Path(os.path.expanduser(cache or DEFAULT_CACHE)) / key / re.sub(r"[^\w.-]", "_", name)


def fetch(url: str, cache: str | None, sha256: str | None = None, again: bool = False) -> Path:
    """Fetch a whole file into the cache, from the web with curl, else with WebDataset's `gopen`, unless it is there.

    It is written beside its place and renamed; of several processes one fetches, and the others wait for it.

    Args:
        url: what `is_url` accepts.
        cache: the cache's folder; None is `DEFAULT_CACHE`.
        sha256: of the content, where it is known.
        again: fetch it even if it is there.

    Returns:
        The file.

    Raises:
        OSError: it cannot be fetched, or is not what `sha256` says. Not an InputError, for no image is broken.
    """
    from filelock import FileLock

    path = cached_file(url, cache, sha256)
    if not again and path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not again and path.is_file():
            return path
        try:
            # One name for all, of which the lock's holder is the only one, so that a killed one leaves no second.
            with files.written_beside(path, path.with_name(f".{path.name}.partial")) as beside:
                _download(url, beside)
                if sha256 is not None and files.sha256(beside) != sha256:
                    raise OSError("its content is not what the manifest beside it says")
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise OSError(f"cannot fetch {url} to {path}: {' '.join(str(error).split())}") from error
    return path


def _download(url: str, path: Path) -> None:
    if not url.lower().startswith(WEB):
        with import_optional("webdataset.gopen").gopen(url) as stream, open(path, "wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
        return
    # Not by gopen, which waits for ever for a host that has stopped sending, and puts the URL into a shell's line.
    options = ["--fail", "--silent", "--show-error", "--location", "--globoff", "--connect-timeout", "30"]
    options += ["--retry", str(RETRIES), "--speed-limit", "1", "--speed-time", str(STALL_SECONDS)]
    done = subprocess.run(["curl", *options, "--output", path, "--", url], capture_output=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.decode(errors="replace") or f"curl ended with {done.returncode}")
