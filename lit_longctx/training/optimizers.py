"""AdamW with moments in float32, in bfloat16 or in 8 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, final

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from lit_longctx.checkpoint.parameters import check_finite, plain
from lit_longctx.checkpoint.unpickling import CheckedReader

OptimizerName = Literal["adamw", "adamw_bf16_moments", "adamw8bit"]
"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) by the dtype of its moments."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""torch's names of first and second moment."""
SLOWEST = 1 - 2**-7
"""Largest beta2: bfloat16s are up to 2⁻⁷ apart, and a smaller decay may round to none."""


def make_optimizer(
    name: OptimizerName,
    groups: list[dict[str, Any]],
    learning_rate: float,
    betas: tuple[float, float],
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """Return an AdamW; bytes of moments per parameter: 8 (`adamw`), 4 (bf16) or about 2 (8 bit).

    Raises:
        ValueError: beta2 is too near 1 for moments in bfloat16.
        ImportError: torchao is missing.
    """
    if name == "adamw_bf16_moments":
        return AdamWBF16Moments(groups, learning_rate, betas)
    if name == "adamw8bit":
        try:
            from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "optimizer 'adamw8bit' needs torchao: pip install 'lit_longctx[torchao]'; or use "
                "'adamw_bf16_moments'"
            ) from error
        return AdamW8bit(groups, lr=learning_rate, betas=betas)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Set the rate of all groups; torchao keeps it in a tensor, which must stay the same one."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def carry_moments(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Fill an optimizer's moments and step counts from a run's checkpoint, resharded as needed.

    Rates, betas and decays stay those of the optimizer. Weights that the checkpoint has no moments
    of begin without.

    Raises:
        ValueError: The checkpoint holds no moments of any of the weights, or some are no finite
            numbers.
    """
    state: Any = get_optimizer_state_dict(module, optimizer)
    reader = CheckedReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    prefix = "optimizer_0.state."
    held = {
        name: {key: value for key, value in values.items() if f"{prefix}{name}.{key}" in stored}
        for name, values in state["state"].items()
    }
    held = {name: values for name, values in held.items() if values}
    if not held:
        raise ValueError(f"{folder} holds no moments of these weights; set carry_optimizer false")
    loaded = {"optimizer_0": {"state": held}}
    dcp.load(loaded, storage_reader=reader, no_dist=not dist.is_initialized())
    moments = {f"{key} of {name}": values[key] for name, values in held.items() for key in MOMENTS}
    plain_ones = {k: v for k, v in moments.items() if type(v) in (Tensor, DTensor)}  # no 8-bit ones
    check_finite(plain_ones, folder)
    set_optimizer_state_dict(module, optimizer, {**state, "state": {**state["state"], **held}})
    for name, parameter in module.named_parameters():
        if plain(name) not in held:
            optimizer.state.pop(parameter, None)


@final
class AdamWBF16Moments(torch.optim.Optimizer):
    """AdamW that keeps both moments in bfloat16 and computes in float32.

    A step is torch's own on float32 copies of one parameter's moments, which are then rounded to
    nearest (as DeepSeek-V3 keeps them, arXiv:2412.19437, §3.3.3).

    Args:
        params: Parameters or groups, which may have a `weight_decay` of their own.
        lr: Learning rate.
        betas: Decay rates of the moments; the second at most 1 − 2⁻⁷.
        eps: Added to the root of the second moment.
        weight_decay: Of groups that name none.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if betas[1] > SLOWEST:
            raise ValueError(
                f"adamw_bf16_moments cannot follow beta2 {betas[1]}: bfloat16 rounds its steps "
                f"away; use {SLOWEST:.4f} or less, or adamw"
            )
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options)
        self.register_load_state_dict_post_hook(_in_bfloat16)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        wide = [state[name].float() for name in MOMENTS]
        adamw(
            [parameter],
            [parameter.grad],
            [wide[0]],
            [wide[1]],
            [],
            [state["step"]],
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for name, moment in zip(MOMENTS, wide, strict=True):
            state[name].copy_(moment)


def _in_bfloat16(optimizer: torch.optim.Optimizer) -> None:
    """Undo torch's cast of a loaded state to the dtype of its parameter; no digit is lost."""
    for state in optimizer.state.values():
        for name in MOMENTS:
            state[name] = state[name].bfloat16()
