"""Stages through the command line: window, theta and rate change within one resumable run."""

import json
from collections.abc import Iterator
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training import runs

from lit_longctx import checkpoint
from lit_longctx.batch import NO_TARGET, StepBatch, one_document
from lit_longctx.data.pretraining import PretrainData, Source
from lit_longctx.data.sampling.stages import Stage
from lit_longctx.data.sampling.steps import Steps
from lit_longctx.position import RoPE, YaRN

STAGES = [
    {"steps": 10, "learning_rate": 3e-3},
    {
        "steps": 20,
        "window": 512,
        "batch_tokens": 4 * 512,
        "micro_batch_size": 2,
        "weights": {"prose": 0.5, "code": 0.5},
        "theta": 3.0,
        "learning_rate": 1e-3,
    },
]


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], runs.Ran]:
    """Options of a run of two stages, and all of it on one process."""
    return fit(tmp_path_factory.mktemp("staged"), STAGES)


def fit(folder: Path, stages: list[dict[str, Any]]) -> tuple[list[str], runs.Ran]:
    """Return the options of a run of these stages, and all of it on one process."""
    data = {"class_path": "PretrainData", "init_args": {"stages": stages}}
    (folder / "stages.yaml").write_text(yaml.safe_dump({"data": data}))
    options = ["--config", str(folder / "stages.yaml")]
    return options, runs.fit(folder / "run", *options).succeeded()


def eleventh_step(stages: list[Stage]) -> StepBatch:
    """Read what a run of these stages trains on in its step 11, on one process."""
    parts = sorted(runs.sources().items())  # as they stand in the YAML file
    sources = {name: Source(part["folder"], part["weight"]) for name, part in parts}
    data = PretrainData(sources, runs.WINDOW, runs.BATCH * runs.WINDOW, 4, stages=stages)
    return Steps(data, 0, 1)[10]


def test_each_stage_warms_up_and_falls_by_itself(staged: tuple[list[str], runs.Ran]):
    entries = runs.witnessed(staged[1].folder)
    for first, steps, peak in ((0, 10, 3e-3), (10, 20, 1e-3)):
        for step in range(steps):
            falling = 0.1 + 0.9 * (1 + cos(pi * (step - 5) / (steps - 6))) / 2
            expected = peak * ((step + 1) / 5 if step < 5 else falling)
            assert entries[first + step + 1].lr == pytest.approx(expected, rel=1e-6)
    tokens = [entries[step].tokens for step in sorted(entries)]
    assert tokens == [n * 2048 for n in range(1, 31)]
    assert [len(entries[step].rows) for step in sorted(entries)] == [8] * 10 + [4] * 20


def test_the_first_step_of_a_stage_sees_its_theta(staged: tuple[list[str], runs.Ran]):
    """Loss of step 11 from the checkpoint of step 10, by hand."""
    step = eleventh_step([Stage(**stage) for stage in STAGES])
    start = staged[1].folder / "checkpoints" / "step-00000010"
    found = {}
    for theta in (1e4, 3.0):
        llama = checkpoint.load_pretrained(start, position=RoPE(theta))
        nats = weights = 0.0
        for batch in step.micro_batches:
            row_weights = batch.loss_weights * (batch.samples % 3).unsqueeze(1)
            nats += float((llama(batch) * row_weights).sum())
            weights += float(row_weights.sum())
        found[theta] = nats / weights
    logged = runs.witnessed(staged[1].folder)[11].loss

    # hardly trained, the model hardly attends: the two thetas differ in the sixth digit
    assert abs(logged - found[3.0]) < 0.2 * abs(logged - found[1e4])


def test_checkpoints_know_theta_and_the_longest_window(staged: tuple[list[str], runs.Ran]):
    for step, theta, context in ((10, 1e4, 256), (20, 3.0, 512), (30, 3.0, 512)):
        folder = staged[1].folder / "checkpoints" / f"step-{step:08d}"
        opened = checkpoint.open_checkpoint(folder)
        assert opened.layers.position == RoPE(theta)
        assert opened.trained_context == context


@pytest.mark.slow
@pytest.mark.parametrize(("step", "ranks"), [(10, 1), (20, 1), (10, 2), (20, 2)])
def test_a_resume_in_any_stage_is_exact(
    staged: tuple[list[str], runs.Ran], step: int, ranks: int, tmp_path: Path
):
    options, alone = staged
    start = alone.folder / "checkpoints" / f"step-{step:08d}"
    ran = runs.fit(tmp_path, *options, "--ckpt_path", start, ranks=ranks).succeeded()
    assert ran.err == ""
    expected = {n: e for n, e in runs.witnessed(alone.folder).items() if n > step}
    found = runs.witnessed(tmp_path)
    if ranks == 1:
        assert found == expected
    assert runs.samples(found) == runs.samples(expected)
    assert runs.largest_difference(runs.losses(found), runs.losses(expected)) <= 1e-6


def test_validation_has_the_window_of_the_stage_being_trained(staged: tuple[list[str], runs.Ran]):
    """Validated after steps 10, 20 and 30: the first stage has just ended, then the second."""
    found = runs.scalars(staged[1].folder)
    steps = {name: [step for step, _ in found[name]] for name in found if "/loss_" in name}
    assert steps["val/loss_len/256"] == [10]  # bucket of documents that fill the first window
    assert steps["val/loss_len/256-512"] == [20, 30]
    assert steps["val/loss_pos/256-512"] == [20, 30]


@pytest.mark.slow
def test_validation_of_a_checkpoint_uses_the_theta_it_was_trained_with(
    staged: tuple[list[str], runs.Ran], tmp_path: Path
):
    options, alone = staged
    for step in (10, 20):
        start = alone.folder / "checkpoints" / f"step-{step:08d}"
        arguments = ["validate", "--config", runs.config(), *options]
        folder = tmp_path / str(step)
        place = ["--trainer.default_root_dir", folder]
        runs.run(*arguments, *place, "--ckpt_path", start, folder=folder).succeeded()
        (found,) = runs.scalars(folder)["val/loss"]
        logged = [value for _, value in runs.scalars(alone.folder)["val/loss"]]
        assert found[1] == pytest.approx(logged[step // 10 - 1], rel=1e-6)


@pytest.mark.slow
def test_stages_that_do_not_fit_the_run_are_refused(
    staged: tuple[list[str], runs.Ran], tmp_path: Path
):
    options, alone = staged
    ran = runs.fit(tmp_path / "a", *options, "--trainer.max_steps", 31)
    assert "the stages have 30 steps; got trainer.max_steps 31" in ran.err
    shorter = json.dumps([STAGES[0] | {"steps": 5}, STAGES[1] | {"steps": 25}])
    start = alone.folder / "checkpoints" / "step-00000010"
    other = ["--data.init_args.stages", shorter, "--ckpt_path", start]
    ran = runs.fit(tmp_path / "b", *options, *other)
    assert ran.code == 1
    assert "until step 10 the run's stages were" in ran.err
    start = alone.folder / "checkpoints" / "step-00000020"
    narrower = json.dumps([STAGES[0], STAGES[1] | {"window": 256, "batch_tokens": 1024}])
    for number, stages in enumerate(
        (narrower, json.dumps([STAGES[0], STAGES[1] | {"learning_rate": 2e-3}]))
    ):
        other = ["--data.init_args.stages", stages, "--ckpt_path", start]
        ran = runs.fit(tmp_path / str(number), *options, *other)
        assert ran.code == 1
        (line,) = ran.err.splitlines()
        assert "until step 20 the run's stages were" in line


YARN = {"factor": 2.0}
RECIPE = [
    {"steps": 10},
    {
        "steps": 10,
        "position": {"class_path": "YaRN", "init_args": {**YARN, "original_context": 256}},
        "document_mask": False,
        "packing": "best_fit",
        "fresh_optimizer": True,
    },
    {"steps": 10, "position": {"class_path": "NoPE"}},
]
"""Scheme, mask, packing and optimizer state change, as from SmolLM3's stages to DroPE."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], runs.Ran]:
    """Options of a run of three stages, and all of it on one process."""
    return fit(tmp_path_factory.mktemp("recipe"), RECIPE)


@pytest.mark.slow
def test_stages_have_their_scheme_and_moments(recipe: tuple[list[str], runs.Ran]):
    """Checkpoints name the scheme; AdamW's count of steps begins anew where moments do."""
    expected = {10: ("RoPE", 10), 20: ("YaRN", 10), 30: ("NoPE", 20)}
    for step, (name, updates) in expected.items():
        folder = recipe[1].folder / "checkpoints" / f"step-{step:08d}"
        assert type(checkpoint.open_checkpoint(folder).layers.position).__name__ == name
        counts = set(steps_in(runs.stored(folder)["optimizer_0"]))
        assert counts == {updates}, (step, counts)


def steps_in(state: Any) -> Iterator[float]:
    """Yield every `step` of an optimizer's state, however it is nested or named."""
    return (float(value) for _, value in tensors_in(state, "step"))


@pytest.mark.slow
def test_without_a_document_mask_a_row_is_one_document(recipe: tuple[list[str], runs.Ran]):
    """Loss of step 11 from the checkpoint of step 10, every row alone, as one text."""
    step = eleventh_step([Stage(10), Stage(10, packing="best_fit", document_mask=False), Stage(10)])
    start = recipe[1].folder / "checkpoints" / "step-00000010"
    llama = checkpoint.load_pretrained(start, position=YaRN(10_000.0, **YARN, original_context=256))
    nats = weights = 0.0
    for batch in step.micro_batches:
        for ids, labels, sample in zip(batch.input_ids, batch.labels, batch.samples, strict=True):
            text = ids[: int((labels != NO_TARGET).sum())][None]
            documents = one_document(*text.shape)
            places = torch.arange(text.shape[1])[None]
            alone = batch._replace(input_ids=text, position_ids=places, documents=documents)
            with torch.no_grad():
                logits = llama.logits(alone)[0].double()
            each = torch.nn.functional.cross_entropy(
                logits, labels[: text.shape[1]], reduction="sum"
            )
            weight = float(sample % 3)
            nats += weight * float(each)
            weights += weight * text.shape[1]
    assert runs.witnessed(recipe[1].folder)[11].loss == pytest.approx(nats / weights, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("step", [10, 20])
def test_a_resume_of_such_stages_is_exact(
    recipe: tuple[list[str], runs.Ran], step: int, tmp_path: Path
):
    options, alone = recipe
    start = alone.folder / "checkpoints" / f"step-{step:08d}"
    ran = runs.fit(tmp_path, *options, "--ckpt_path", start).succeeded()
    assert ran.err == ""
    expected = {n: e for n, e in runs.witnessed(alone.folder).items() if n > step}
    assert runs.witnessed(tmp_path) == expected


@pytest.mark.slow
def test_a_stage_with_weights_of_its_own_is_refused(tmp_path: Path):
    stages = json.dumps([{"steps": 10}, {"steps": 20, "position": {"class_path": "TransformerXL"}}])
    ran = runs.fit(tmp_path, "--data.init_args.stages", stages)
    assert ran.code == 1
    (line,) = ran.err.splitlines()
    assert "TransformerXL" in line
    assert "has weights" in line


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_carried_moments_are_those_of_the_start(
    recipe: tuple[list[str], runs.Ran], ranks: int, tmp_path: Path
):
    """After one step, counts are one further and moments 0.9 × the start's + those without it."""
    start = recipe[1].folder / "checkpoints" / "step-00000010"
    shared = ["--model.init_args.config", "null", "--trainer.max_steps", "1"]
    shared += ["--model.init_args.schedule.init_args.warmup_steps", "0"]
    shared += ["--model.init_args.gradient_clip", "1e9", "--trainer.limit_val_batches", "0"]
    shared += ["--model.init_args.checkpoint", str(start)]
    before = runs.stored(start)["optimizer_0"]
    found = {}
    for carried in ("true", "false"):
        options = [*shared, "--model.init_args.carry_optimizer", carried]
        ran = runs.fit(tmp_path / carried, *options, ranks=ranks).succeeded()
        assert ("moments and step counts from" in ran.out) == (carried == "true")
        found[carried] = runs.stored(ran.folder / "checkpoints" / "step-00000001")["optimizer_0"]
    assert set(steps_in(found["true"])) == {11}
    assert set(steps_in(found["false"])) == {1}
    for name, fresh in tensors_in(found["false"], "exp_avg"):
        kept, new = (dict(tensors_in(each, "exp_avg"))[name] for each in (before, found["true"]))
        torch.testing.assert_close(new, 0.9 * kept + fresh, rtol=1e-4, atol=1e-9)


def tensors_in(state: Any, last: str, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of an optimizer's state whose name ends so."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from tensors_in(value, last, f"{path}.{name}")
        elif str(name).rpartition(".")[2] == last:
            yield f"{path}.{name}", value


def test_carried_moments_need_a_run(tmp_path: Path):
    ran = runs.fit(tmp_path, "--model.init_args.carry_optimizer", "true")
    assert ran.code == 1
    (line,) = ran.err.splitlines()
    assert "carry_optimizer needs a run folder" in line
