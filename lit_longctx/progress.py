"""Lines that say how far a piece of work is, often enough to see that it goes on."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO, TypeVar

import torch.distributed as dist
from tqdm import tqdm

T = TypeVar("T")
EVERY = 30.0
"""Most seconds between two lines."""


class Heartbeat:
    """Prints a line whenever none was printed for so many seconds, however long a step takes.

    A thread of its own watches the time, while the context is open.

    Args:
        line: Returns what to print; the thread calls it.
        every: Most seconds between two lines.
    """

    def __init__(self, line: Callable[[], str], every: float = EVERY) -> None:
        self.line, self.every = line, every
        self.due = time.monotonic() + every
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Heartbeat":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def say(self, text: str) -> None:
        """Print a line now; the next is due so many seconds later."""
        self.due = time.monotonic() + self.every
        print(text, flush=True)

    def _watch(self) -> None:
        while not self.ended.wait(max(0.0, self.due - time.monotonic())):
            if time.monotonic() >= self.due:
                self.say(self.line())


def counted(
    items: Sequence[T], what: str, size: Callable[[T], float], every: float = EVERY
) -> Iterator[T]:
    """Yield items and say how many are done: in a terminal a bar, else lines with the time left.

    Args:
        items: The work.
        what: What is being done, to begin each line.
        size: What an item costs, in any unit.
        every: Most seconds between two lines, the first of which follows the first item.
    """
    if sys.stdout.isatty():
        yield from tqdm(items, desc=what, disable=None)
        return
    clock, done = TimeLeft(sum(map(size, items))), 0

    def line() -> str:
        return f"{what}: {done} of {len(items)}  {clock}"

    with Heartbeat(line, every) as heartbeat:
        for item in items:
            yield item
            done += 1
            clock.done += size(item)
            if done in (1, len(items)):
                heartbeat.say(line())


class TimeLeft:
    """Time that is left, if the rest goes on as fast as what is done.

    Args:
        total: The whole work, in any unit.
    """

    def __init__(self, total: float) -> None:
        self.total, self.done = total, 0.0
        self.begin = time.monotonic()

    @property
    def passed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.begin

    def __str__(self) -> str:
        """Return `ETA h:mm:ss`; without anything done, the time that it has taken so far."""
        if self.done <= 0:
            return f"after {duration(self.passed)}"
        return f"ETA {duration(self.passed / self.done * max(0.0, self.total - self.done))}"


def duration(seconds: float) -> str:
    """Return h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line on one process of a run; `file` is standard output by default."""
    if dist.is_available() and dist.is_initialized():
        first = dist.get_rank() == 0
    else:
        ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
        first = next((rank for rank in ranks if rank is not None), "0") == "0"
    if first:
        print(line, file=file, flush=True)
