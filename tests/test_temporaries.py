"""What killed runs leave behind goes; what a living one writes stays."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest

from lit_longctx import manifest, temporaries

FORK = multiprocessing.get_context("fork")


def write(whole: str, target: Path, begun: Connection) -> None:
    with getattr(manifest, whole)(target) as temporary:
        (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
        begun.send(None)
        time.sleep(600)


class Writer(NamedTuple):
    """A process that is writing `tmp_path/out`."""

    process: BaseProcess
    whole: Callable[[Path], AbstractContextManager[Path]]
    half: str

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture(params=["whole_folder", "whole_file"])
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Writer]:
    begun, told = FORK.Pipe()
    process = FORK.Process(target=write, args=(request.param, tmp_path / "out", told))
    process.start()
    begun.recv()
    (half,) = left(tmp_path)
    found = Writer(process, getattr(manifest, request.param), half)
    yield found
    found.kill()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_run_left_is_removed_by_the_next(writer, tmp_path, capsys):
    writer.kill()
    assert left(tmp_path) == [writer.half]
    with writer.whole(tmp_path / "out") as temporary:
        assert left(tmp_path) == [temporary.name]
    assert left(tmp_path) == ["out"]
    number = writer.process.pid
    said = f"removed {tmp_path / writer.half}, left by process {number}, which is dead\n"
    assert capsys.readouterr().out == said


def test_what_a_living_run_writes_stays_and_is_named(writer, tmp_path, capsys):
    with writer.whole(tmp_path / "out"):
        assert writer.half in left(tmp_path)
    assert left(tmp_path) == ["out", writer.half]
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / writer.half} is of process {writer.process.pid} on ")
    assert out.endswith("; if that is dead, remove it\n")


def renamed(path: Path, host: str, process: int) -> Path:
    return path.rename(path.with_name(f"out{temporaries.MARK}{host}-{process}-0123abcd"))


def test_only_the_dead_of_this_machine_are_removed(tmp_path):
    """A number that is free here may be a process' elsewhere; a lock tells of other containers."""
    ended = FORK.Process(target=int)
    ended.start()
    ended.join()
    ours = temporaries._host()
    for host, process, locked, stays in (
        (ours, ended.pid, False, False),
        (ours, ended.pid, True, True),
        (ours, os.getpid(), False, True),
        (f"{ours}-2", ended.pid, False, True),
        ("", ended.pid, False, True),
    ):
        made = temporaries.beside(tmp_path / "out")
        made.mkdir()
        path = renamed(made, host, process) if host else made.rename(tmp_path / "out.tmp-1a2b")
        lock = temporaries.held(path) if locked else None
        if lock:
            lock.__enter__()
        removed, kept = temporaries.remove_dead(tmp_path / "out")
        assert path.exists() == stays == bool(kept) == (not removed)
        if lock:
            lock.__exit__(None, None, None)
        temporaries.remove(path)


def test_other_targets_are_left_alone(tmp_path):
    for name in ("out2.tmp-x", "other", "out[1].tmp-x"):
        (tmp_path / name).mkdir()
    assert temporaries.remove_dead(tmp_path / "out") == ([], [])
    assert len(temporaries.remove_dead(tmp_path / "out[1]")[1]) == 1


def test_a_sealed_copy_replaces_what_differs_and_nothing_else(tmp_path):
    def copy(text: str) -> int:
        with manifest.sealed_copy(tmp_path / "copy") as folder:
            (folder / "file").write_text(text)
        assert manifest.fault(tmp_path / "copy") is None
        assert left(tmp_path) == ["copy"]
        return (tmp_path / "copy").stat().st_ino

    first = copy("a")
    time.sleep(0.01)
    assert copy("a") == first
    assert copy("b") != first
    assert (tmp_path / "copy" / "file").read_text() == "b"
    (tmp_path / "copy" / "file").write_text("c")
    copy("b")
    assert (tmp_path / "copy" / "file").read_text() == "b"
