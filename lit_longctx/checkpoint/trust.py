"""Which classes a model folder may name: schemes of this package, and a user's own by consent."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from lit_longctx import position
from lit_longctx.position import PositionScheme

_trusting: ContextVar[bool] = ContextVar("trusting", default=False)


class Untrusted(ValueError):
    """A folder names a class that is not the package's."""


@contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """Let model folders that are opened meanwhile import the modules they name."""
    before = _trusting.set(trust or _trusting.get())
    try:
        yield
    finally:
        _trusting.reset(before)


def scheme_named(path: str) -> type[PositionScheme]:
    """Return a position scheme by class path; nothing is imported that is not trusted.

    Raises:
        Untrusted: No scheme of `lit_longctx.position`, and neither trusted nor imported already.
    """
    module, _, name = path.rpartition(".")
    ours = module == position.__name__ or module.startswith(f"{position.__name__}.")
    if ours:  # the file of one of ours may have changed
        found = getattr(position, name, None)
    elif _trusting.get():
        found = getattr(importlib.import_module(module), name, None)
    else:
        found = getattr(sys.modules.get(module), name, None)
    if isinstance(found, type) and issubclass(found, PositionScheme):
        return found
    cure = "" if ours else "; if it is a scheme of yours, --trust (in Python trust=True) imports it"
    raise Untrusted(f"position {path} is none of lit_longctx.position's schemes{cure}")
