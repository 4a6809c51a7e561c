"""The cache of whole files from object storage that all processes of a node share."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ObjectStorage:
    """How folders at a URL are reached, and the cache of whole files that all of a node share.

    A file appears under its name when it is complete and verified, and goes, least recently opened
    first, to make room for another. A file that some process has open goes last, and stays readable
    for that process. One download at a time per cache: two processes never fetch the same file.
    """

    cache: str = ""
    """Folder on the node's disk; default: $LIT_LONGCTX_CACHE, else ~/.cache/lit_longctx/chunks."""
    cache_gib: float = 32.0
    """Most that the cached files take, in GiB; 5 chunks of every source at least."""
    options: dict[str, Any] | None = None
    """Options of litdata's downloader; for s3 the arguments of boto3's client: endpoint_url, …"""

    @property
    def root(self) -> Path:
        """Folder of the cache."""
        default = os.environ.get("LIT_LONGCTX_CACHE") or "~/.cache/lit_longctx/chunks"
        return Path(self.cache or default).expanduser()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes and threads from changing the cache."""
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def find(self, key: str) -> BufferedReader | None:
        """Open a cached file, None if there is none; it counts as in use until it is closed."""
        try:
            file = open(self.root / "files" / key, "rb")  # noqa: SIM115
        except FileNotFoundError:
            return None
        # a lock belongs to the open file: memory maps keep it, and a killed process drops it
        fcntl.flock(file, fcntl.LOCK_SH)
        now = time.time_ns()  # without it the kernel's clock counts, which ticks every few ms
        os.utime(file.fileno(), ns=(now, now))
        return file

    def open(self, key: str, size: int, make: Callable[[Path], None]) -> BufferedReader:
        """Open a cached file of `size` bytes; where there is none, `make` writes it first."""
        if file := self.find(key):
            return file
        path = self.root / "files" / key
        with self.locked():
            if file := self.find(key):
                return file
            self._make_room(size)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.incomplete")
            try:
                make(part)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            file = self.find(key)
        assert file
        return file

    def discard(self, key: str) -> None:
        """Remove a file from the cache."""
        with self.locked():
            (self.root / "files" / key).unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        limit = int(self.cache_gib * 2**30)
        if size > limit:
            raise ValueError(
                f"cache {self.root} of {self.cache_gib} GiB is too small for a file of {size} "
                f"bytes; set storage.cache_gib to {6 * size / 2**30:.2g} or more"
            )
        for part in (self.root / "files").rglob("*.incomplete*"):  # of a process that was killed
            part.unlink()
        files = [path for path in (self.root / "files").rglob("*") if path.is_file()]
        excess = sum(path.stat().st_size for path in files) + size - limit
        if excess > 0:
            for path in sorted(files, key=lambda path: (_in_use(path), path.stat().st_mtime_ns)):
                excess -= path.stat().st_size
                path.unlink()
                if excess <= 0:
                    break


def _in_use(path: Path) -> bool:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
