"""A text file that grows where files cannot: numbered parts in a folder, read back as one text."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

from cluster import storage

READERS = 8
"""Parts that are read at the same time."""
_PART = re.compile(r"[0-9]{6}-[0-9]{6}")


class Parts:
    """`NAME.parts/` in a folder or below a URI: `GENERATION-NUMBER`, each written once, durable when `append` returns.

    Whoever opens it to write has a generation of its own, above all that are there. So a writer that was given up but
    still lives can neither overwrite nor follow the rows of the next one: in the order of names they come before.
    """

    def __init__(self, folder: str, name: str) -> None:
        """The next generation is taken, by an empty part: one that was opened but not written to counts too."""
        self.uri = storage.join(folder, f"{name}.parts")
        self.generation = max(map(int, (part[:6] for part in _names(self.uri))), default=0) + 1
        self._next = 0
        if storage.is_local(self.uri):
            storage.local_path(self.uri).mkdir(parents=True, exist_ok=True)
        self.append("")

    def append(self, text: str) -> None:
        """`text` follows what was there, durably."""
        storage.write_text(storage.join(self.uri, f"{self.generation:06d}-{self._next:06d}"), text)
        self._next += 1

    def read(self) -> str:
        """The text of all parts of all generations, in the order of their names."""
        return read(self.uri)


def read(uri: str) -> str:
    """The text of the parts in the folder `uri`, which need not exist."""
    with ThreadPoolExecutor(READERS) as pool:
        contents = pool.map(storage.read_bytes, [storage.join(uri, name) for name in _names(uri)])
        return b"".join(contents).decode("utf-8", "surrogateescape")


def _names(uri: str) -> list[str]:
    return sorted(name for name in storage.list_names(uri) if _PART.fullmatch(name))
