"""LongCE: weights and gradients against a loop over transformers, one target at a time."""

from pathlib import Path

import pytest
import torch
from differences import assert_near
from training import runs

from lit_longctx.batch import NO_TARGET, Batch, pack
from lit_longctx.checkpoint import export_pretrained
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.keys import OWN
from lit_longctx.position import RoPE
from lit_longctx.training.long_ce import LongCE
from lit_longctx.training.step import accumulate_gradients

transformers = pytest.importorskip("transformers")
HOW = LongCE(truncated_context=12, stride=5, largest=1.5)
BOS, SEQ = 1, 50


@pytest.fixture(scope="module")
def llama() -> Llama:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(40, 32, 48, 2, 4, 2), RoPE())
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def theirs(llama: Llama, tmp_path_factory: pytest.TempPathFactory):
    folder = export_pretrained(llama, tmp_path_factory.mktemp("exported") / "llama")
    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)


def packed() -> Batch:
    """Rows of documents shorter than the truncated context, and longer than several strides."""
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(3, 40, (2, SEQ + 1), generator=generator)
    windows[0, [0, 9, 30]] = BOS
    windows[1, [0, 44]] = BOS
    return pack(windows, BOS, samples=torch.arange(2))


def alone(theirs, ids: torch.Tensor, target: int) -> torch.Tensor:
    """Nats of a token after a text, by transformers."""
    return -theirs(ids[None]).logits[0, -1].log_softmax(0)[target]


def by_loop(theirs, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight of each target, and their loss with gradient."""
    weights, loss = torch.zeros(batch.labels.shape), torch.zeros(())
    for row, column in (batch.labels != NO_TARGET).nonzero().tolist():
        ids, target = batch.input_ids[row, : column + 1], int(batch.labels[row, column])
        begin = column - int(batch.position_ids[row, column])
        full = alone(theirs, ids[begin:], target)
        # the authors cut texts at multiples of the stride; a text's first tokens see all of it
        late = max(0, column + 1 - HOW.truncated_context) // HOW.stride * HOW.stride
        truncated = alone(theirs, ids[max(begin, late) :], target)
        weight = (truncated - full).exp().clamp(max=HOW.largest).detach()
        weights[row, column] = weight
        loss = loss + weight * full
    return weights, loss / (batch.labels != NO_TARGET).sum()


def test_weights_and_gradients_are_those_of_a_loop(llama: Llama, theirs):
    batch = packed()
    weights, loss = by_loop(theirs, batch)
    loss.backward()
    assert (weights == HOW.largest).any()
    assert ((weights < 0.9) & (weights > 0)).any()
    assert_near("LongCE: weights", HOW.weighed(llama, batch).loss_weights, weights, atol=1e-5)

    found = accumulate_gradients(llama, [batch], [OWN], lambda x: x.backward(), 1e9, long_ce=HOW)
    assert_near("LongCE: loss", found.loss.float(), loss.detach(), atol=1e-5)
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in llama.named_parameters():
        assert weight.grad is not None
        assert_near("LongCE: gradients", weight.grad, gradients[name], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"truncated_context": 0}, {"stride": 0}, {"largest": 0.0}, {"largest": float("inf")}],
)
def test_settings_without_meaning_are_refused(options: dict[str, float]):
    with pytest.raises(ValueError, match="long_ce: "):
        LongCE(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_a_run_is_the_same_on_one_process_and_two(tmp_path: Path):
    how = ["--model.init_args.long_ce", '{"truncated_context": 32, "stride": 16}']
    how += ["--trainer.max_steps", "10"]
    one, two = (runs.fit(tmp_path / str(n), *how, ranks=n).succeeded() for n in (1, 2))
    losses = [runs.losses(runs.witnessed(ran.folder)) for ran in (one, two)]
    assert runs.largest_difference(*losses) <= 1e-5
    plain = runs.losses(runs.witnessed(runs.alone().folder))
    assert abs(losses[0][0] - plain[0]) > 1e-3
