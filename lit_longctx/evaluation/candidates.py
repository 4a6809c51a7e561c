"""What is measured side by side: checkpoints, each under its own and other position schemes."""

import ast
import inspect
import sys
import uuid
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple, cast

import torch

from lit_longctx import position as position_package
from lit_longctx.checkpoint import Checkpoint, describe_position, open_checkpoint
from lit_longctx.manifest import identity, short_hash
from lit_longctx.model.layers import LayerKind, LayerPattern
from lit_longctx.position import PositionScheme


class Candidate(NamedTuple):
    """A checkpoint under a position scheme: what a column of the tables is about."""

    folder: str
    """As it was given."""
    start: Checkpoint
    position: PositionScheme | LayerPattern | None = None
    """Scheme, or pattern of kinds of layers, in place of the checkpoint's own."""

    @property
    def name(self) -> str:
        """The folder, with the scheme unless it is the checkpoint's own."""
        return f"{self.folder} {short(self.position)}" if self.position else self.folder

    def described(self) -> dict[str, Any]:
        """Return what decides its values."""
        kinds = kinds_in(self.position) if self.position else self.start.layers.kinds
        schemes = [kind.position for kind in kinds]
        known = {"checkpoint": self.folder, "holds": identity(self.start.path)}
        known |= {"scheme_code": code_of(schemes)}
        return known | ({"position": describe_position(self.position)} if self.position else {})


def kinds_in(position: PositionScheme | LayerPattern) -> list[LayerKind]:
    """Return the kinds of a pattern, or the one kind of a scheme."""
    if isinstance(position, LayerPattern):
        return list(position.kinds.values())
    return [LayerKind(position)]


def code_of(schemes: Sequence[PositionScheme]) -> str:
    """Return a hash of the code of position schemes: our package of them, and their own modules.

    Comments do not count. A scheme whose code is in no file is a new one each time.
    """
    classes = {kind for scheme in schemes for kind in type(scheme).__mro__}
    named = {kind.__module__ for kind in classes if issubclass(kind, PositionScheme)}
    package = {name for name in sys.modules if name.startswith(f"{position_package.__name__}.")}
    return short_hash([_code(name) for name in sorted(named | package)])


def _code(module: str) -> str:
    try:
        return ast.unparse(ast.parse(inspect.getsource(sys.modules[module])))
    except (OSError, TypeError, KeyError, SyntaxError):
        return uuid.uuid4().hex


def open_candidates(
    folders: Sequence[str], positions: Sequence[PositionScheme | LayerPattern]
) -> dict[str, Candidate]:
    """Open and verify each checkpoint, once; return each under its own and all other schemes."""
    found: dict[str, Candidate] = {}
    for folder in dict.fromkeys(folders):
        start = open_checkpoint(folder).verified()
        for position in (None, *positions):
            candidate = Candidate(folder, start, position)
            if candidate.name in found:
                raise ValueError(f"two columns would be named {candidate.name}; leave one out")
            if position:
                for kind in kinds_in(position):
                    check_weightless(start, kind.position)
            found[candidate.name] = candidate
    return found


def check_weightless(start: Checkpoint, position: PositionScheme) -> None:
    """Refuse a scheme with weights of its own that the checkpoint does not hold."""
    with torch.device("meta"):
        layer = position.layer(start.config.num_attention_heads, start.config.head_width)
    held = any(isinstance(kind.position, type(position)) for kind in start.layers.kinds)
    if next(layer.parameters(), None) is not None and not held:
        raise ValueError(
            f"{type(position).__name__} has weights that {start.path} does not hold; train it first"
        )


def short(position: PositionScheme | LayerPattern) -> str:
    """Return a scheme's name and what of its settings is not the default; of lists, the ends.

    Of a pattern, the schemes and windows of one repetition.
    """
    if isinstance(position, LayerPattern):
        order = [position.kinds[name] for name in position.layers]
        return f"[{', '.join(_short_kind(kind) for kind in order)}]"
    told = []
    for each in fields(cast(Any, position)):
        value = getattr(position, each.name)
        if value != each.default:
            ends = isinstance(value, Sequence) and len(value) > 2
            told.append(f"{each.name}={f'[{value[0]}…{value[-1]}]' if ends else value}")
    return f"{type(position).__name__}({', '.join(told)})"


def _short_kind(kind: LayerKind) -> str:
    return short(kind.position) + kind.beyond_position()
