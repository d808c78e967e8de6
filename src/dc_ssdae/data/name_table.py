"""Many strings in two arrays, which worker processes share instead of copying."""

import hashlib
from collections.abc import Iterable

import numpy as np


class NameTable:
    """An unchanging list of strings, kept as bytes: about a third of a list's memory.

    A list's strings have reference counts, and a forked process that touches those copies the page; an array's do not.

    Args:
        characters: uint8 (C,), the strings in UTF-8, one after the other.
        ends: int64 (N,), where each of them ends.
    """

    def __init__(self, characters: np.ndarray, ends: np.ndarray) -> None:
        self.characters = characters
        self.ends = ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "NameTable":
        """Build from strings; bytes of file names that are no UTF-8, as Python's surrogates, come back as they were."""
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), lengths.cumsum())

    def sha256(self) -> str:
        """The SHA-256 of the names in their order, as hexadecimal digits."""
        return hashlib.sha256(self.characters.tobytes() + self.ends.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return self.characters[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogateescape")
