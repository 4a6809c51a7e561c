"""Moments taken up from a checkpoint: what comes over, what stays, what is refused."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from lit_longctx.training.optimizers import carry_moments, make_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def trained(steps: int, moment: float = 0.0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model after some updates; `moment` is added to one of its moments."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
    optimizer = make_optimizer("adamw", [{"params": module.parameters()}], 1e-2, (0.9, 0.95))
    for _ in range(steps):
        module(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if steps:
        optimizer.state[module[1].weight]["exp_avg"] += moment
    return module, optimizer


def saved(folder: Path, steps: int, moment: float = 0.0) -> torch.optim.Optimizer:
    """Write a checkpoint of such a model as runs do."""
    module, optimizer = trained(steps, moment)
    state = {"optimizer_0": get_optimizer_state_dict(module, optimizer)}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return optimizer


@pytest.mark.parametrize("steps_before", [0, 2])
def test_moments_and_counts_come_over_and_settings_stay(steps_before: int, tmp_path: Path):
    stored = saved(tmp_path, 3)
    module, optimizer = trained(steps_before)
    optimizer.param_groups[0]["lr"] = 0.5
    carry_moments(module, optimizer, tmp_path)
    assert optimizer.param_groups[0]["lr"] == 0.5
    for ours, theirs in zip(optimizer.state.values(), stored.state.values(), strict=True):
        assert int(ours["step"]) == 3
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_the_checkpoint_has_no_moments_of_begins_without(tmp_path: Path):
    saved(tmp_path, 3)
    module, optimizer = trained(0)
    module.append(nn.Linear(2, 2, bias=False))
    optimizer.add_param_group({"params": module[2].parameters()})
    carry_moments(module, optimizer, tmp_path)
    assert module[2].weight not in optimizer.state
    assert int(optimizer.state[module[0].weight]["step"]) == 3


def test_moments_that_are_no_numbers_are_refused(tmp_path: Path):
    saved(tmp_path, 2, float("nan"))
    module, optimizer = trained(0)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: exp_avg of 1\.weight .* holds NaN"):
        carry_moments(module, optimizer, tmp_path)


def test_a_checkpoint_without_moments_is_refused(tmp_path: Path):
    dcp.save({"state_dict": {"weight": torch.zeros(2)}}, checkpoint_id=tmp_path, no_dist=True)
    module, optimizer = trained(0)
    with pytest.raises(ValueError, match="holds no moments of these weights"):
        carry_moments(module, optimizer, tmp_path)
