"""Functions whose result is computed again in backward, in place of what they would keep."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
    """Call a function but keep only its inputs for backward, which computes the rest again.

    For functions that draw no random numbers. `options` are those of `torch.utils.checkpoint`.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    options = {"use_reentrant": False, "preserve_rng_state": False, **options}
    return checkpoint(function, *inputs, **options)
