"""The process that renders chat templates: one for each process that asks, with limits."""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from typing import Any, final

SECONDS = 5.0
"""Processor time for a rendering, and as much again for each MiB of messages."""
MEMORY = 2**29
"""Bytes for a rendering, and 32 for each byte of messages."""
CHARACTERS = 2**20
"""Characters that a template may write, and 8 for each of the messages."""
RENDERING = "lit_longctx.data.tokens.rendering"


class TemplateFails(Exception):
    """A template is broken, or refuses its messages."""


class TemplateOverLimit(ValueError):
    """A template needs more than it may have; no other messages are put to it."""


def render(source: str, variables: dict[str, Any]) -> str:
    """Return what a template makes of its variables.

    It runs in another process, in Jinja's sandbox, at about 0.1 ms more than in this one.

    Args:
        source: Jinja text.
        variables: What it knows; JSON can say it.

    Raises:
        TemplateFails: As Jinja, or the template, says.
        TemplateOverLimit: It needs more time, memory or text than a template may.
    """
    return _process(os.getpid()).render(source, variables)


@cache
def _process(asked_by: int) -> "TemplateProcess":
    """Return the process of this one; a fork of it has one of its own."""
    return TemplateProcess()


@final
class TemplateProcess:
    """Starts when it is first asked, and again after a template went over its limits."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """See the function `render`."""
        size = len(json.dumps(variables))
        limits = {
            "seconds": SECONDS * (1 + size / 2**20),
            "memory": MEMORY + 32 * size,
            "characters": CHARACTERS + 8 * size,
        }
        request = json.dumps({"source": source, "variables": variables, **limits})
        with self.lock:
            found = json.loads(self._ask(request.encode() + b"\n", limits["seconds"]))
        if over := found.get("over"):
            unit, most = ("bytes of ", "memory") if over == "memory" else ("", "characters")
            raise TemplateOverLimit(f"needs more than {limits[most]:,} {unit}{over}")
        if "error" in found:
            raise TemplateFails(found["error"])
        return found["text"]

    def _ask(self, request: bytes, seconds: float) -> bytes:
        process = self.process = self.process or _started()
        assert process.stdin
        assert process.stdout
        try:
            with suppress(BrokenPipeError):  # why it ended is said below
                process.stdin.write(request)
                process.stdin.flush()
            line = process.stdout.readline()
        except BaseException:  # an interrupt: its reply would be taken for the next one's
            self.process = None
            process.kill()
            raise
        if line.endswith(b"\n"):
            return line
        self.process = None
        _, said = process.communicate()
        if process.returncode == -signal.SIGPROF:
            raise TemplateOverLimit(f"needs more than {seconds:.3g} seconds of the processor")
        why = said.decode(errors="replace").strip().splitlines()[-1:] or [process.returncode]
        raise TemplateOverLimit(f"ended the process that rendered it ({why[0]})")


def _started() -> "subprocess.Popen[bytes]":
    """Start the process; it ends with this one, of whose end its input tells."""
    path = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", RENDERING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    atexit.register(_end, process, os.getpid())
    return process


def _end(process: "subprocess.Popen[bytes]", asked_by: int) -> None:
    if os.getpid() == asked_by and process.poll() is None:
        process.kill()
        process.communicate()
