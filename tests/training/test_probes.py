"""Probes with every validation: on two processes as on one, and no trace of them in training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import runs

from lit_longctx.checkpoint import load_pretrained
from lit_longctx.data.store.windows import Windows
from lit_longctx.data.tokens.tokenizer import ByteTokenizer
from lit_longctx.decoding import reading
from lit_longctx.evaluation.retrieval.prompts import Haystack
from lit_longctx.evaluation.retrieval.tasks import Passkey

pytestmark = pytest.mark.slow

LENGTHS, DEPTHS = [256, 280, 300], [0.0, 50.0, 100.0]
PROBES = {
    "class_path": "Probes",
    "init_args": {
        "tasks": ["passkey"],
        "grid": {"lengths": LENGTHS, "depths": DEPTHS, "samples": 1},
    },
}


def fit(folder: Path, ranks: int, more: Sequence[Any] = (), **probes: Any) -> runs.Ran:
    content = {**PROBES, "init_args": {**PROBES["init_args"], **probes}}
    arguments = ["--trainer.callbacks+", json.dumps(content), "--trainer.max_steps", 10, *more]
    return runs.fit(folder, *arguments, ranks=ranks)


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> runs.Ran:
    return fit(tmp_path_factory.mktemp("probed") / "run", 1).succeeded()


def scalars(folder: Path) -> dict[str, float]:
    """The probes' values after ten steps."""
    tags = runs.scalars(folder)
    return {tag: values[-1][1] for tag, values in tags.items() if tag.startswith("probe")}


@pytest.mark.slow
def test_the_log_holds_the_loss_of_the_answers(probed: runs.Ran):
    """A loop over the prompts, on the checkpoint of the validated step."""
    tags = scalars(probed.folder)
    llama = load_pretrained(str(probed.folder)).eval()
    held_out = Windows(next(iter(runs.sources().values()))["folder"], "held_out", 256)
    tokens = held_out.read(0, min(held_out.tokens, 2 * max(LENGTHS)))
    hay = Haystack.of_tokens(ByteTokenizer(), tokens)
    for length in LENGTHS:
        losses = []
        for depth in DEPTHS:
            sample = Passkey().sample(hay, length, depth, 0)
            whole = [*sample.prompt_ids.tolist(), *sample.answer_ids.tolist()]
            with torch.no_grad():
                logits = llama.logits(reading(torch.tensor([whole])))[0]
            answer = torch.tensor(sample.answer_ids.astype(int))
            losses.append(float(F.cross_entropy(logits[length - 1 : -1], answer)))
        mean = sum(losses) / len(losses)
        assert tags[f"probe/passkey_nats/{length}"] == pytest.approx(mean, rel=1e-5)
        assert tags[f"probe/passkey/{length}"] == 0
    assert "step 10  passkey 0.00 at 256, 0.00 at 280, 0.00 at 300" in probed.out
    log = EventAccumulator(str(probed.folder), size_guidance={"images": 0}).Reload()
    assert [image.step for image in log.Images("probe/passkey")] == [10]
    assert len(LENGTHS) * len(DEPTHS) % 2  # of two processes one reads a prompt more than it counts


@pytest.mark.slow
def test_two_processes_share_the_prompts(probed: runs.Ran, tmp_path: Path):
    both = fit(tmp_path / "both", 2).succeeded()
    assert scalars(both.folder) == pytest.approx(scalars(probed.folder), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zigzag", "ulysses"])
def test_two_processes_share_the_rows_of_prompts(name: str, probed: runs.Ran, tmp_path: Path):
    strategy = "--trainer.strategy.context_parallel"
    both = fit(tmp_path, 2, [f"{strategy}_size", 2, strategy, name]).succeeded()
    assert scalars(both.folder) == pytest.approx(scalars(probed.folder), rel=1e-5)


@pytest.mark.slow
def test_training_is_as_without_them(probed: runs.Ran):
    seen, alone = runs.witnessed(probed.folder), runs.witnessed(runs.alone().folder)
    assert len(seen) == 10
    assert all(seen[step].rows == alone[step].rows for step in seen)
    assert all(seen[step].loss == pytest.approx(alone[step].loss, rel=1e-6) for step in (1, 2, 5))


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("probes", "message"),
    [
        ({"tasks": ["guessing"]}, "task 'guessing' unknown"),
        ({"grid": {"answers": "generated"}}, "set it to teacher_forced"),
        ({"grid": {"lengths": [20]}}, "length 20 is shorter than the prompt"),
    ],
)
def test_what_could_not_be_asked_is_refused_before_training(probes, message, tmp_path: Path):
    ran = fit(tmp_path / "run", 1, **probes)
    assert ran.code == 1
    assert message in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert "step 10" not in ran.out
