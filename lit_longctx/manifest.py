"""Folders that are whole or not there: hashed, renamed into place, verified before use.

No format underneath (litdata chunks, distributed checkpoints, safetensors) carries a checksum: of
200 random bit flips, 194 to 200 load silently. Here every file's SHA-256 stands in `manifest.json`,
and last in it its own.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from lit_longctx.progress import say
from lit_longctx.temporaries import beside, held, remove, remove_dead

NAME = "manifest.json"


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def files_of(folder: Path) -> list[Path]:
    """All files below a folder but its manifest, in a fixed order."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / NAME)


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step: readers see the old text or the new."""
    remove_dead(path)
    temporary = beside(path)
    temporary.write_text(text)
    with held(temporary):
        flush(temporary)
        temporary.replace(path)
    flush(path.parent)


def seal(folder: Path, hashes: dict[str, str], **content: Any) -> None:
    """Write the manifest last: only a folder that has one is finished."""
    sizes = {name: (folder / name).stat().st_size for name in hashes}
    files = {name: {"bytes": sizes[name], "sha256": hashes[name]} for name in sorted(hashes)}
    write_text(folder / NAME, _signed({**content, "files": files}))


def _signed(content: dict[str, Any]) -> str:
    own = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=1) + "\n"


def hash_files(folder: Path, part: int = 0, parts: int = 1) -> dict[str, str]:
    """Flush and hash a folder's files (every `parts`-th of them): relative name → SHA-256."""
    hashes = {}
    for path in files_of(folder)[part::parts]:
        flush(path)
        hashes[path.relative_to(folder).as_posix()] = digest(path)
    return hashes


def publish(temporary: Path, target: Path) -> None:
    """Rename a finished folder into place; refuses to replace anything."""
    if target.exists():
        raise ValueError(f"{target} exists already; choose another folder or remove it")
    temporary.rename(target)
    flush(target.parent)


def whole_folder(target: Path) -> AbstractContextManager[Path]:
    """Yield a temporary folder that becomes `target` if the block succeeds, and vanishes if not.

    What earlier runs that were killed left beside `target` is removed; what others may be writing
    there is named.
    """
    return _whole(target, "folder", Path.mkdir)


def whole_file(target: Path) -> AbstractContextManager[Path]:
    """Yield an empty file that becomes `target` if the block succeeds; see `whole_folder`."""
    return _whole(target, "file", Path.touch)


@contextmanager
def _whole(target: Path, kind: str, make: Callable[[Path], None]) -> Iterator[Path]:
    if target.exists():
        raise ValueError(f"{target} exists already; choose another {kind} or remove it")
    for lines in remove_dead(target):
        for line in lines:
            say(line)
    with _temporary(target, make) as temporary:
        yield temporary
        publish(temporary, target)


@contextmanager
def sealed_copy(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that is sealed and takes the place of `target`.

    A `target` of the same content stays as it is, so that those who read it find it at any time.
    """
    remove_dead(target)
    with _temporary(target, Path.mkdir) as temporary:
        yield temporary
        seal(temporary, hash_files(temporary))
        new, old = (temporary / NAME).read_bytes(), target / NAME
        if not (old.is_file() and old.read_bytes() == new and fault(target) is None):
            remove(target)
            publish(temporary, target)


@contextmanager
def _temporary(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Make a temporary beside `target`, locked while the block runs and gone after it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(target)
    make(temporary)
    try:
        with held(temporary):
            yield temporary
    finally:
        remove(temporary)


def read(folder: Path) -> dict[str, Any]:
    """Return a folder's manifest; ValueError if there is none or it is torn."""
    torn = ValueError(f"{folder / NAME} is torn; make the folder anew")
    try:
        text = (folder / NAME).read_bytes()
        content = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"{folder} is not finished: it has no {NAME}") from None
    except ValueError:
        raise torn from None
    if not isinstance(content, dict) or not content.pop("sha256", None):
        raise torn
    if _signed(content).encode() != text:
        raise torn
    files = content.get("files", {})
    if not isinstance(files, dict) or not all(map(_describes_a_file, files.values())):
        raise torn
    for name in files:
        check_inside(folder / NAME, name)
    return content


def _describes_a_file(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int)


def check_inside(listed: Path | str, name: Any) -> None:
    """Refuse the name of a file, read from `listed`, that is none or leads out of its folder.

    Every name that comes with a folder passes here before a file is opened or written by it.
    """
    path = PurePosixPath(name if isinstance(name, str) else "")
    if path.is_absolute() or ".." in path.parts or not path.parts or {"\\", "\0"} & set(name):
        raise ValueError(f"{listed} lists a file outside of itself, {name}; do not trust it")


def check_file(folder: Path, name: str, expected: dict[str, Any], hashed: bool = True) -> None:
    """Compare one file with its manifest entry; ValueError names the file and what is wrong.

    Without a SHA-256, as in folders that others made, the size alone is compared.
    """
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path} is missing; its folder is torn")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise ValueError(f"{path} is torn: expected {expected['bytes']} bytes, got {size}")
    if hashed and "sha256" in expected and digest(path) != expected["sha256"]:
        raise ValueError(f"{path} is altered: its SHA-256 is not the one in {NAME}")


def verify(folder: Path, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Check the files of a folder (every `parts`-th of them) and return its manifest."""
    manifest = read(folder)
    for name, expected in list(manifest["files"].items())[part::parts]:
        check_file(folder, name, expected)
    return manifest


def fault(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Return what is wrong with a folder's files (every `parts`-th of them), None if nothing is."""
    try:
        verify(folder, part, parts)
    except ValueError as error:
        return str(error)
    return None


def verify_sizes(folder: Path, hashed: Collection[str] = ()) -> None:
    """Check that a folder's files are there and as large as they were; some by their hash too."""
    for name, expected in read(folder)["files"].items():
        check_file(folder, name, expected, name in hashed)


def is_sealed(folder: Path) -> bool:
    """Whether a folder has a manifest of ours; other programs have files of that name too.

    Ours begin as `_signed` writes them, torn or not, and list files or bear their own hash.
    """
    try:
        text = (folder / NAME).read_bytes()
    except OSError:
        return False
    return text.startswith(b'{\n "') and (b'\n "sha256": "' in text or b'\n "files": {' in text)


def check_listed(folder: Path, names: Collection[str]) -> None:
    """Compare files with the manifest that lists them: their folder's or the one's above it.

    Names that are in no manifest are not compared: not every folder has one.

    Raises:
        ValueError: A file is missing, torn or altered.
    """
    for place, below in ((folder, ""), (folder.parent, f"{folder.name}/")):
        if not is_sealed(place):
            continue
        files = read(place)["files"]
        for listed in (f"{below}{name}" for name in names):
            try:
                if listed in files:
                    check_file(place, listed, files[listed])
            except ValueError as error:
                raise ValueError(f"{error}; {kept_otherwise(place)}") from None


def kept_otherwise(folder: Path) -> str:
    """What to do about a fault in a folder that users may edit."""
    return f"copy it again, or, if you changed it yourself, remove {folder / NAME}"


def short_hash(content: Any) -> str:
    """Short hash of anything JSON can say."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def identity(folder: Path) -> str:
    """Short hash of what a folder holds: of its manifest, or of its files' sizes and times."""
    if is_sealed(folder):
        return short_hash(read(folder))
    files = [(p.name, p.stat()) for p in sorted(folder.iterdir()) if p.is_file()]
    return short_hash([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])
