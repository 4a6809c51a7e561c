"""Fine-tuning through the command line: one process or more, other micro-batches, a resume."""

import json
from pathlib import Path

import pytest
import yaml
from data.test_finetuning import chats, questions
from training import runs

from lit_longctx.data.making.prepare import prepare


@runs.shared
def chat_config() -> Path:
    """A tiny Llama on dialogues in packed rows and long questions in rows of their own."""
    folder = runs.workshop() / "sft"
    folder.mkdir()
    sources = {}
    for name, rows, packing in (("chat", chats(80), "best_fit"), ("long", questions(24), "none")):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare([str(file)], str(folder / name), chat=True, held_out=0.1, chunk_tokens=1024)
        sources[name] = {"folder": str(folder / name), "packing": packing}
    content = yaml.safe_load(runs.config().read_text())
    model = {"class_path": "SFT", "init_args": content["model"]["init_args"]}
    model["init_args"]["schedule"]["init_args"]["warmup_steps"] = 3
    data = {"sources": sources, "window": 256, "batch_tokens": 8 * 256, "held_out_windows": 4}
    trainer = {**content["trainer"], "max_steps": 6, "val_check_interval": 6}
    content |= {
        "model": model,
        "data": {"class_path": "FinetuneData", "init_args": {**data, "input_loss": 0.5}},
        "trainer": trainer,
        "checkpoints": {"every_n_steps": 3, "keep": 9},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def fit(folder: Path, mean: str, size: int, ranks: int = 1, *more: str) -> Path:
    arguments = ["fit", "--config", chat_config(), "--trainer.default_root_dir", folder]
    arguments += ["--data.init_args.mean", mean, "--data.init_args.micro_batch_size", size]
    arguments += ["--trainer.callbacks+", "training.runs.Witness", *more]
    return runs.run(*arguments, folder=folder, ranks=ranks).succeeded().folder


@runs.shared
def alone(mean: str) -> Path:
    return fit(runs.workshop() / f"sft-{mean}", mean, 8)


def compare(found: Path, expected: Path) -> None:
    ours, theirs = runs.witnessed(found), runs.witnessed(expected)
    assert sorted(ours) == sorted(theirs) == list(range(1, 7))
    for name in ("loss", "grad_norm"):
        pairs = ([getattr(seen[step], name) for step in sorted(seen)] for seen in (ours, theirs))
        difference = runs.largest_difference(*pairs)
        print(f"{found.name}: {name} differs by {difference:.1e}")
        assert difference <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mean", "size", "ranks"),
    [
        ("longalign", 4, 2),
        *(
            (mean, size, ranks)
            for mean in ("token", "sequence", "longalign")
            for size, ranks in ((1, 1), (2, 1), (2, 2), (2, 4))
        ),
    ],
)
def test_layouts_train_alike(mean: str, size: int, ranks: int, tmp_path: Path):
    """Each step's loss and gradient norm, over targets that are ragged in every row."""
    compare(fit(tmp_path / f"{mean}-{size}x{ranks}", mean, size, ranks), alone(mean))


@pytest.mark.slow
def test_a_resume_goes_on_with_the_same_losses(tmp_path: Path):
    folder = tmp_path / "stopped"
    fit(folder, "longalign", 8, 1, "--trainer.max_steps", "3")
    fit(folder, "longalign", 2, 2, "--ckpt_path", "last")
    compare(folder, alone("longalign"))


@pytest.mark.slow
def test_means_differ_and_held_out_loss_is_that_of_answers():
    losses = {}
    for mean in ("token", "longalign"):
        (losses[mean],) = {runs.witnessed(alone(mean))[1].loss}
        assert "val/loss_source/long" in runs.scalars(alone(mean))
    assert losses["token"] != losses["longalign"]
