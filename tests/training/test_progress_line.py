"""The progress line: after the first step, every few steps, and within steps that take long."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from training.runs import own_process_group, quiet_trainer
from training.test_module import CONFIG, rows, step

from lit_longctx.model.layers import Layers
from lit_longctx.position import RoPE
from lit_longctx.training.callbacks import ProgressLine
from lit_longctx.training.checkpoints import Checkpoints
from lit_longctx.training.flops import model_flops
from lit_longctx.training.module import ContinualPretrain

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_trace() -> Iterator[None]:
    with own_process_group():
        yield


class Slow(Callback):
    """Holds up every micro-batch."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        self.wait()


def lines(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    steps: int,
    wait: Callable[[], None] = lambda: None,
    every_s: float = 1e6,
    every_n_steps: int = 5,
) -> list[str]:
    """Train steps of 4 micro-batches and return what the run says from its first step on."""
    progress = ProgressLine(every_n_steps)
    progress.every_s = every_s
    module = ContinualPretrain(config=CONFIG, compute_dtype="float32")
    trainer = quiet_trainer(folder, steps, [Slow(wait), progress])
    trainer.fit(module, DataLoader([step(rows(i), 2) for i in range(steps)], batch_size=None))
    out = capsys.readouterr().out
    assert "validation: never, as validation is switched off" in out
    return [line for line in out.splitlines() if line.startswith("step")]


def test_quick_steps_are_said_at_the_first_and_every_few(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    said = lines(tmp_path, capsys, 12)
    assert [re.match(r"step (\d+)/12  loss", line)[1] for line in said] == ["1", "5", "10", "12"]
    assert all(re.search(r"tok/s  ETA \d:\d\d:\d\d$", line) for line in said)


def test_mfu_is_of_the_tokens_that_the_speed_is_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """On a pretended peak of 1e9 FLOP/s: both are sums over the same seconds."""
    monkeypatch.setattr(ProgressLine, "peak", 1e9, raising=False)
    found: list[dict[str, float]] = []
    real = ContinualPretrain.log_dict

    def log_dict(self: ContinualPretrain, values: dict[str, float], **options: Any) -> None:
        found.append(dict(values))
        real(self, values, **options)

    monkeypatch.setattr(ContinualPretrain, "log_dict", log_dict)
    said = lines(tmp_path, capsys, 2, every_n_steps=1)
    assert all(re.search(r"tok/s  [\d,]+ a GPU  MFU \d+% causal, \d+% full  ETA", s) for s in said)
    speeds = [values for values in found if "perf/mfu_full" in values]
    assert len(speeds) == 2
    layers = Layers.uniform(RoPE(), CONFIG.num_hidden_layers)
    for number, values in enumerate(speeds):
        flops = model_flops(CONFIG, layers, rows(number))
        tokens = rows(number).input_ids.numel()
        for name in ("causal", "full"):
            per_token = values[f"perf/mfu_{name}"] / values["perf/tokens_per_s_per_gpu"] * 1e9
            assert per_token == pytest.approx(float(getattr(flops, name)) / tokens, rel=1e-9)


@pytest.mark.slow
def test_within_a_slow_step_the_micro_batches_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    said = lines(tmp_path, capsys, 2, lambda: time.sleep(0.15), every_s=0.05)
    within = [re.match(r"step (\d)/2  step (\d): (\d) of 4 micro-batches  ", s) for s in said]
    counts = [tuple(map(int, found.groups())) for found in within if found]
    assert counts == sorted(counts)
    assert {(0, 1), (1, 2)} <= {(done, now) for done, now, _ in counts}
    assert {1, 2, 3} & {number for *_, number in counts}
    assert sum(" loss " in line for line in said) == 2


@pytest.mark.slow
def test_of_slow_steps_the_last_before_30_seconds_are_over_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Steps of 8 s on a clock of the test's own: what is left is said to the second."""
    now = 0.0

    def wait() -> None:
        nonlocal now
        now += 2.0

    monkeypatch.setattr(time, "monotonic", lambda: now)
    said = lines(tmp_path, capsys, 10, wait, every_s=30.0, every_n_steps=100)
    assert [(line.split("/")[0], line.split("ETA ")[1]) for line in said] == [
        ("step 1", "0:01:12"),
        ("step 4", "0:00:48"),
        ("step 7", "0:00:24"),
        ("step 10", "0:00:00"),
    ]


def test_a_run_that_fails_stops_to_say_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    progress = ProgressLine()
    progress.every_s = 0.01
    module = ContinualPretrain(config=CONFIG, compute_dtype="float32")
    trainer = quiet_trainer(tmp_path, 1, [progress])
    batch = rows(0)
    batch.loss_weights.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        trainer.fit(module, DataLoader([step(batch, 2)], batch_size=None))
    assert progress.heartbeat is None
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("callback", [Checkpoints, ProgressLine])
def test_every_few_steps_are_one_or_more(callback: type[Callback]):
    with pytest.raises(ValueError, match=r"every_n_steps 0 must be 1 or more"):
        callback(every_n_steps=0)
