"""Files of a data folder by name, on disk or in object storage, verified before they are read.

Transport is litdata's downloader, so that a URL means here what it means there; hashes, and errors
that say what to do, are ours.
"""

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from litdata.streaming.downloader import Downloader, get_downloader

from lit_longctx import manifest
from lit_longctx.data.store.data_manifest import Manifest
from lit_longctx.data.store.storage import ObjectStorage

SCHEMES = ("s3://", "gs://", "azure://", "r2://", "hf://", "local:")
"""Beginnings of a URL that litdata's downloaders understand."""
TRIES = 5
"""How often a file is asked for before its absence is an error."""
PAUSE = 1.0
"""Seconds between the first and the second try; each later pause is twice as long."""


class LocalFiles:
    """Files of a folder on disk, each compared with its entry when it is first opened."""

    def __init__(self, folder: Path, entries: dict[str, dict[str, Any]]) -> None:
        self.folder, self.entries = folder, _inside(folder, entries)
        self.checked: set[str] = set()
        self.fetches: Counter[str] = Counter()

    def open(self, name: str) -> BufferedReader:
        """Open a file for reading; ValueError if it is missing, torn or altered."""
        self._check(name)
        return open(self.folder / name, "rb")

    def _check(self, name: str) -> None:
        entry = _entry(self.folder, self.entries, name)
        if name not in self.checked:
            manifest.check_file(self.folder, name, entry)
            self.checked.add(name)

    def subfolder(self, name: str) -> Path:
        """Return where a folder of small files lies on disk, such as the tokenizer's; checked."""
        for entry in self.entries:
            if entry.startswith(f"{name}/"):
                self._check(entry)
        return self.folder / name


class RemoteFiles:
    """Files of a folder in object storage, fetched on demand into the node's cache.

    Args:
        url: The folder.
        entries: Size in bytes and, where known, SHA-256 of each file, by name.
        key: Name of the folder's content in the cache.
        storage: Cache and access.
        connection: What `connect` gave, if it was called already.
    """

    def __init__(
        self,
        url: str,
        entries: dict[str, dict[str, Any]],
        key: str,
        storage: ObjectStorage,
        connection: Downloader | None = None,
    ) -> None:
        self.url, self.entries, self.key, self.storage = url, _inside(url, entries), key, storage
        self.checked: set[str] = set()
        self.fetches: Counter[str] = Counter()
        """How often each file was asked for over the network by this process."""
        self._connection = connection

    def open(self, name: str) -> BufferedReader:
        """Open a file for reading; ValueError if it cannot be had as its entry describes it."""
        entry = _entry(self.url, self.entries, name)
        file = self._cached(name)
        if name not in self.checked and not _intact(file, entry):
            file.close()
            self.storage.discard(f"{self.key}/{name}")
            file = self._cached(name)
        self.checked.add(name)
        return file

    def _cached(self, name: str) -> BufferedReader:
        size = self.entries[name]["bytes"]
        return self.storage.open(f"{self.key}/{name}", size, lambda part: self._fetch(name, part))

    def _fetch(self, name: str, part: Path) -> None:
        entry = self.entries[name]

        def check(path: Path) -> None:
            with open(path, "rb") as file:
                if not _intact(file, entry):
                    raise ValueError("what came is not what the folder's manifest describes")
            self.checked.add(name)

        if self._connection is None:
            self._connection = connect(self.url, self.storage)
        url = f"{self.url}/{name}"
        fetch(self._connection, url, part, check, lambda: self.fetches.update([name]))

    def subfolder(self, name: str) -> Path:
        """Return where a folder of small files lies on disk; they are outside the cache's bound."""
        target = self.storage.root / "folders" / self.key / name
        names = [entry for entry in self.entries if entry.startswith(f"{name}/")]
        with self.storage.locked():
            with suppress(ValueError):
                for entry in names:
                    manifest.check_file(target.parent, entry, self.entries[entry])
                return target
            shutil.rmtree(target, ignore_errors=True)
            with manifest.whole_folder(target) as folder:
                for entry in names:
                    path = folder / entry.removeprefix(f"{name}/")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._fetch(entry, path)
        return target

    def __getstate__(self) -> dict[str, Any]:
        """Leave the connection behind when a loader worker copies this."""
        return {**self.__dict__, "_connection": None}


Files = LocalFiles | RemoteFiles
Entries = dict[str, dict[str, Any]]


def _inside(folder: Path | str, entries: Entries) -> Entries:
    for name in entries:
        manifest.check_inside(folder, name)
    return entries


def _entry(folder: Path | str, entries: Entries, name: str) -> dict[str, Any]:
    if name not in entries:
        raise ValueError(f"{folder} does not list {name}; make the folder anew")
    return entries[name]


def is_remote(folder: str | Path) -> bool:
    """Whether a folder is a URL; ValueError if it is one that litdata cannot reach."""
    if "://" in str(folder) and not str(folder).startswith(SCHEMES):
        raise ValueError(f"folder {folder} is at no known place; use a path or {' '.join(SCHEMES)}")
    return str(folder).startswith(SCHEMES)


def open_folder(folder: str | Path, storage: ObjectStorage) -> tuple[Manifest, Files]:
    """Return the manifest of a prepared folder, on disk or at a URL, and its files."""
    if is_remote(folder):
        url = str(folder).rstrip("/")
        connection = connect(url, storage)
        content = json.loads(fetch_text(connection, f"{url}/{manifest.NAME}", manifest.read))
        content.pop("sha256")
        files = RemoteFiles(url, content["files"], fingerprint(content), storage, connection)
        return Manifest.from_json(content, folder), files
    if not Path(folder).is_dir():
        raise ValueError(f"data folder {folder} does not exist; make it with lit_longctx prepare")
    content = manifest.read(Path(folder))
    return Manifest.from_json(content, folder), LocalFiles(Path(folder), content["files"])


def fingerprint(content: Any) -> str:
    """Short name of a folder's content."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def fetch_text(
    connection: Downloader, url: str, check: Callable[[Path], Any] = lambda folder: None
) -> str:
    """Return a small file's text; `check` gets a folder with it, and raises if it is torn."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / url.rsplit("/", 1)[1]
        fetch(connection, url, path, lambda _: check(Path(folder)))
        return path.read_text()


def fetch(
    connection: Downloader,
    url: str,
    target: Path,
    check: Callable[[Path], Any],
    count: Callable[[], None] = lambda: None,
) -> None:
    """Download a file until `check` accepts it, a few times with growing pauses.

    Raises:
        ValueError: It is not there, or did not come whole in `TRIES` tries.
    """
    fault = ""
    for attempt in range(TRIES):
        time.sleep(PAUSE * 2 ** (attempt - 1) if attempt else 0)
        count()
        try:
            download(connection, url, target)
            check(target)
            return
        except Exception as error:  # every backend has its own
            fault = " ".join(str(error).split()).replace(f"{target.parent}/", "")
            fault = fault or type(error).__name__
            if _is_final(error):
                raise ValueError(
                    f"{url} cannot be read: {fault}; check address and access"
                ) from None
            target.unlink(missing_ok=True)
    raise ValueError(
        f"{url} could not be read in {TRIES} tries: {fault}; "
        "check the connection, then copy the file there again"
    )


def connect(url: str, storage: ObjectStorage) -> Downloader:
    """Return litdata's downloader for a folder; it costs about 50 ms, and survives a fork."""
    options = dict(storage.options or {})
    if url.startswith("s3://"):
        from botocore.config import Config

        # litdata's default is 1,000 silent tries; ours count, and speak
        options.setdefault("config", Config(retries={"total_max_attempts": 1}, connect_timeout=20))
    return get_downloader(url, "", [], options)


def download(connection: Downloader, url: str, target: Path) -> None:
    """Copy a file from object storage, once."""
    if type(connection).download_fileobj is Downloader.download_fileobj:
        connection.download_file(url, str(target))
        Path(f"{target}.lock").unlink(missing_ok=True)
    else:
        # not `download_file`: it goes through obstore, which knows no http:// and no fork
        with open(target, "wb") as file:
            connection.download_fileobj(url, file)


def _intact(file: BufferedReader, entry: dict[str, Any]) -> bool:
    """Whether an open file is what its entry says; leaves it at its beginning."""
    whole = os.fstat(file.fileno()).st_size == entry["bytes"]
    if whole and "sha256" in entry:
        whole = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
    file.seek(0)
    return whole


def _is_final(error: Exception) -> bool:
    """Whether another try cannot help: not there, or not allowed."""
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    missing = isinstance(error, FileNotFoundError) or type(error).__name__ == "NoCredentialsError"
    return missing or metadata.get("HTTPStatusCode") in (401, 403, 404)
