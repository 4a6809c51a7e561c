"""Render chat templates as `transformers` does; run as a program, for whoever asks, within limits.

Templates come with models of strangers. Jinja's sandbox keeps them from files and from code, but
lets them count to 10^10 or write 'a' * 10^10; so they run in a process of their own, which the
kernel ends (`template_process`). Imports Jinja alone, so that it starts at once.
"""

import json
import os
import resource
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment


@final
class Generation(Extension):
    """`{% generation %}`, which some templates put around answers: read, and of no effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        """Return what stands between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """Compile a template for the sandbox, with the settings and functions of `transformers`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(source)


def as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def refuse(message: str) -> None:
    """Let a template refuse its messages."""
    raise jinja2.TemplateError(message)


def reply(request: dict[str, Any]) -> bytes:
    """Return a line of JSON: `text`, or the `error` of a template, or the limit it is `over`."""
    try:
        text = compiled(request["source"]).render(**request["variables"])
        if len(text) > request["characters"]:
            return b'{"over": "characters"}\n'
        return json.dumps({"text": text}).encode() + b"\n"
    except MemoryError:
        return b'{"over": "memory"}\n'
    except Exception as error:  # whatever a template may do wrong
        return json.dumps({"error": " ".join(str(error).split())[:500]}).encode() + b"\n"


def serve() -> None:
    """Answer requests, a line of JSON each, until standard input ends.

    A request names its limits: `seconds` of the processor, at whose end the kernel ends this
    process by SIGPROF; bytes of `memory` above what this process begins with; `characters` of text.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    begun = address_space()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        memory = begun + len(line) + request["memory"]
        with suppress(ValueError, OSError):  # macOS has no such limit
            resource.setrlimit(
                resource.RLIMIT_AS, (memory if most < 0 else min(memory, most), most)
            )
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        found = reply(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(found)
        sys.stdout.buffer.flush()


def address_space() -> int:
    """Bytes of address space of this process."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 2**30


if __name__ == "__main__":
    serve()
