"""Signals that ask a run to stop: noted at once, acted on between two steps."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from lit_longctx.progress import say

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""What Slurm, Kubernetes, torchrun and Ctrl-C send."""
SAME = 0.5
"""Seconds within which a signal counts as the one before: torchrun passes on what a terminal or
Slurm has sent to the whole process group already."""
GO_ON = 75
"""Exit code of a run that was asked to stop and saved: EX_TEMPFAIL of sysexits.h, try again."""


class Preempted(Exception):
    """A run has saved and stopped because a signal asked it to; it can go on later.

    Args:
        message: What stopped it, and when.
        code: Exit code for this process.
    """

    def __init__(self, message: str, code: int = GO_ON) -> None:
        super().__init__(message)
        self.code = code


class StopSignals:
    """Notes the first signal that asks this process to stop; a second one ends it at once.

    Python calls a handler only when the main thread comes back from C, which a collective that
    hangs never does. So a thread reads the signals from a pipe (`signal.set_wakeup_fd`).

    Args:
        before_end: Called before a second signal ends this process, with exit code 128 + signal.
    """

    def __init__(self, before_end: Callable[[], None] = lambda: None) -> None:
        self.before_end = before_end
        self.received = 0
        """Number of the signal; 0 for none."""
        reading, self.writing = os.pipe()
        os.set_blocking(self.writing, False)
        self.before = {number: signal.signal(number, _noted) for number in SIGNALS}
        signal.set_wakeup_fd(self.writing, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self.restore)  # signals of a child are its own
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()

    def restore(self) -> None:
        """Let signals do what they did before."""
        if signal.getsignal(signal.SIGTERM) is _noted:
            signal.set_wakeup_fd(-1)
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _watch(self, reading: int) -> None:
        first = 0.0
        while True:
            number = os.read(reading, 1)[0]
            if number not in SIGNALS:  # others have handlers too, and come through the same pipe
                continue
            name = signal.Signals(number).name
            if not self.received:
                self.received, first = number, time.monotonic()
                say(f"{name}: the run saves and stops after this step; once more ends it at once")
            elif time.monotonic() > first + SAME:
                self.before_end()
                os._exit(128 + number)


def _noted(number: int, frame: FrameType | None) -> None:
    """Do nothing: the thread has read it."""


def outlive_stop_signals(worker: int) -> None:
    """Let a loader worker go on where a signal went to all processes: its run will end it.

    A worker that died would raise in the run while that saves. As with torch's own handler, SIGTERM
    of the parent ends it.
    """
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
