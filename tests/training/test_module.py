"""One optimizer step: the loss and its gradients however the rows are spread, and what stops it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from training.runs import own_process_group, quiet_trainer, whole_weights

from lit_longctx.batch import Batch, StepBatch, pack
from lit_longctx.data.sampling.data_description import DataDescription, TrainingData, describe_data
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE
from lit_longctx.training.module import ContinualPretrain
from lit_longctx.training.schedule import WarmupCosine

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
BOS, ROWS, SEQ = 1, 8, 40


@pytest.fixture(autouse=True)
def no_trace() -> Iterator[None]:
    with own_process_group():
        yield


def rows(seed: int) -> Batch:
    """Packed documents with ragged weights; rows 2, 3 and 6 weigh nothing."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(2, CONFIG.vocab_size, (ROWS, SEQ + 1), generator=generator)
    windows[torch.rand(windows.shape, generator=generator) < 0.08] = BOS
    batch = pack(windows, BOS, samples=torch.arange(ROWS) + ROWS * seed)
    ragged = torch.rand(batch.loss_weights.shape, generator=generator).pow(4)
    ragged[[2, 3, 6]] = 0
    ragged[5, 10:] = 0
    return batch._replace(loss_weights=batch.loss_weights * ragged)


def part(batch: Batch, first: int, number: int) -> Batch:
    """Return some rows of a batch as a micro-batch."""
    cut = slice(first, first + number)
    ids = batch.documents.ids[cut]
    begins = F.pad(ids.diff(dim=1) != 0, (1, 0), value=True)
    edges = torch.cat([begins.flatten().nonzero().flatten(), torch.tensor([ids.numel()])]).int()
    documents = batch.documents._replace(ids=ids, boundaries=edges, longest=int(edges.diff().max()))
    return Batch(*(field[cut] for field in batch[:-1]), documents=documents)


def step(batch: Batch, micro_batch_size: int) -> StepBatch:
    parts = [part(batch, i, micro_batch_size) for i in range(0, ROWS, micro_batch_size)]
    after = int(batch.samples[-1]) + 1
    return StepBatch(parts, after, after * batch.input_ids.shape[1])


class Watcher(Callback):
    """Keeps each step's weights, its gradients after clipping, and its metrics."""

    poison_at = -1
    """Step whose gradient becomes NaN while its loss stays finite."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []
        self.steps: list[float] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.weights.append(whole_weights(module))

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step == self.poison_at:
            next(module.parameters()).grad.to_local()[0] = float("nan")

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Any
    ) -> None:
        self.gradients.append({n: p.grad.full_tensor() for n, p in module.named_parameters()})

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: StepBatch, i: int
    ) -> None:
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.weights.append(whole_weights(module))

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        self.weights.append(whole_weights(module))
        (optimizer,) = trainer.optimizers
        self.steps = [float(state["step"]) for state in optimizer.state.values()]


def train(
    steps: Sequence[StepBatch], folder: Path, watcher: Watcher | None = None, **options: Any
) -> Watcher:
    """Run the steps under FSDP2 on one process."""
    options = {"learning_rate": 1e-2, "schedule": WarmupCosine(), **options}
    module = ContinualPretrain(config=CONFIG, compute_dtype="float32", **options)
    watcher = watcher or Watcher()
    trainer = quiet_trainer(folder, len(steps), [watcher])
    trainer.fit(module, DataLoader(steps, batch_size=None))
    return watcher


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the largest difference is within the tolerance of the largest value."""
    assert found.isfinite().all()
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def plain_model(weights: dict[str, Tensor]) -> Llama:
    """Return the same model without sharding."""
    llama = Llama(CONFIG, RoPE())
    llama.load_state_dict({name.removeprefix("llama."): w for name, w in weights.items()})
    return llama


def plain_loss(llama: Llama, batch: Batch) -> Tensor:
    """Torch's cross-entropy of the joint batch, averaged with the weights."""
    nats = F.cross_entropy(llama.logits(batch).transpose(1, 2), batch.labels, reduction="none")
    return (nats * batch.loss_weights).sum() / batch.loss_weights.sum()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_gradients_are_those_of_the_joint_batch(micro_batch_size: int, tmp_path: Path):
    batch = rows(seed=0)
    watcher = train([step(batch, micro_batch_size)], tmp_path, gradient_clip=1e9)
    llama = plain_model(watcher.weights[0])
    loss = plain_loss(llama, batch)
    loss.backward()
    assert watcher.metrics[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in llama.named_parameters():
        assert close(watcher.gradients[0][f"llama.{name}"], parameter.grad, 1e-6), name


def adamw(
    weight: Tensor, gradients: Sequence[Tensor], rates: Sequence[float], decay: float
) -> list[Tensor]:
    """Loshchilov & Hutter 2017 (arXiv:1711.05101), algorithm 2, betas 0.9 and 0.95."""
    weight, m, v = weight.double(), 0.0, 0.0
    course = []
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m = 0.9 * m + 0.1 * g.double()
        v = 0.95 * v + 0.05 * g.double() ** 2
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        weight = weight - rate * (step + decay * weight)
        course.append(weight)
    return course


def test_updates_are_adamw_written_by_hand(tmp_path: Path):
    batches = [rows(seed) for seed in range(4)]
    rates = [5e-3, 1e-2, 1e-2, 1e-3]  # two steps of warm-up, then both ends of the cosine
    options = {"gradient_clip": 0.5, "learning_rate": 1e-2, "weight_decay": 0.3}
    watcher = train(
        [step(b, 2) for b in batches], tmp_path, schedule=WarmupCosine(warmup_steps=2), **options
    )
    assert [m["train/lr"] for m in watcher.metrics] == pytest.approx(rates, rel=1e-6)

    # each link by itself: a difference in the last digit of a gradient near 0 turns an update round
    for t, batch in enumerate(batches):
        llama = plain_model(watcher.weights[t])
        plain_loss(llama, batch).backward()
        norm = float(sum(p.grad.square().sum() for p in llama.parameters()).sqrt())
        assert norm > 0.5  # so that clipping is at work
        assert watcher.metrics[t]["train/grad_norm"] == pytest.approx(norm, rel=1e-6)
        for name, p in llama.named_parameters():
            assert close(watcher.gradients[t][f"llama.{name}"], p.grad * 0.5 / norm, 2e-6), name

    for name, start in watcher.weights[0].items():
        gradients = [g[name] for g in watcher.gradients]
        course = adamw(start, gradients, rates, decay=0.3 if start.ndim == 2 else 0.0)
        for t, expected in enumerate(course, 1):
            assert close(watcher.weights[t][name], expected, 3e-7), name


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_a_step_without_any_weight_changes_no_gradient_and_is_no_nan(
    micro_batch_size: int, tmp_path: Path
):
    nothing = rows(seed=0)
    nothing = nothing._replace(loss_weights=nothing.loss_weights * 0)
    watcher = train([step(nothing, micro_batch_size)], tmp_path)
    assert watcher.metrics[0]["train/loss"] == 0
    assert all((g == 0).all() for g in watcher.gradients[0].values())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_update(where: str, tmp_path: Path):
    poisoned = step(rows(seed=1), 2)
    if where == "loss":
        poisoned.micro_batches[-1].loss_weights[0, 0] = float("inf")
    watcher = Watcher()
    watcher.poison_at = 1 if where == "gradient" else -1
    with pytest.raises(FloatingPointError, match=r"step 1: .* samples 8 to 15 on rank 0"):
        train([step(rows(seed=0), 2), poisoned], tmp_path, watcher)
    _, before, after = watcher.weights
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert set(watcher.steps) == {1.0}  # of AdamW's state: it took one step, not two


def test_start_is_either_a_checkpoint_or_a_config():
    with pytest.raises(ValueError, match="either a checkpoint"):
        ContinualPretrain()
    with pytest.raises(ValueError, match="either a checkpoint"):
        ContinualPretrain(checkpoint="somewhere", config=CONFIG)


def test_the_context_of_another_data_module_is_the_window_it_declares():
    """The command line takes any data module; what it does not declare is not guessed."""

    class Declared(TrainingData):
        def description(self) -> DataDescription:
            return DataDescription(window=4096)

    for data, context in ((Declared(), 4096), (LightningDataModule(), None), (None, None)):
        assert describe_data(data).window_until(3) == context
