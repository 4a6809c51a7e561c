"""How often tests repeat what takes long: `make reliability` sets THOROUGH, the suite does not."""

import os
from typing import TypeVar

T = TypeVar("T")


def thorough(many: T, few: T) -> T:
    """Return the first where figures are made, the second where a fault need only be found."""
    return many if os.environ.get("THOROUGH") else few
