"""Temporary files and folders beside what they become, removed once their owner is dead."""

import fcntl
import glob
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = ".tmp-"
"""Stands in the name of a temporary, between its target's name and its owner."""
OWNER = re.compile(r"(.+)-(\d+)-[0-9a-f]{8}")
"""Host and process number of a temporary's owner, and what makes its name unique."""


def beside(target: Path) -> Path:
    """Name of a temporary next to `target`, on the same file system; it names its owner."""
    return target.with_name(f"{target.name}{MARK}{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


@contextmanager
def held(temporary: Path) -> Iterator[None]:
    """Lock a temporary; the kernel unlocks it when this process ends, however it ends."""
    handle = os.open(temporary, os.O_RDONLY)
    try:
        with suppress(OSError):  # NFS locks no folders: there the process number alone tells
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def remove_dead(target: Path) -> tuple[list[str], list[str]]:
    """Remove the temporaries of `target` whose owners were killed.

    An owner is dead if it ran on this machine, no process has its number, and nobody locks what it
    left.

    Returns:
        A line for each that was removed, and a line for each that may be in use.
    """
    removed, left = [], []
    for path in sorted(target.parent.glob(f"{glob.escape(target.name)}{MARK}*")):
        owner = OWNER.fullmatch(path.name.removeprefix(f"{target.name}{MARK}"))
        if owner and owner[1] == _host() and not _alive(int(owner[2])) and not _locked(path):
            remove(path)
            removed.append(f"removed {path}, left by process {owner[2]}, which is dead")
        else:
            whose = f"process {owner[2]} on {owner[1]}" if owner else "an unknown process"
            left.append(f"{path} is of {whose}; if that is dead, remove it")
    return removed, left


def remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it; no error if it is gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname(), flags=re.ASCII)[:64]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # another user's; a number that no process has stays for a person to judge
    return True


def _locked(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False
