"""Probes over lengths and depths, and what evaluate writes of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from training import runs

from lit_longctx.data.tokens.tokenizer import ByteTokenizer
from lit_longctx.evaluation.evaluate import evaluate
from lit_longctx.evaluation.retrieval import grid as module
from lit_longctx.evaluation.retrieval.grid import Grid, Probe
from lit_longctx.evaluation.retrieval.prompts import Haystack
from lit_longctx.evaluation.retrieval.scoring import TeacherForced
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE

CODER = ByteTokenizer()


@pytest.fixture
def llama():
    model = Llama(LlamaConfig(258, 32, 64, 1, 2), RoPE())
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


def scores(probe, llama):
    return [probe.measure(llama, unit) for unit in probe.eval_items()]


def test_every_cell_is_the_mean_over_its_own_prompts(llama, monkeypatch):
    """A stand-in answers what stands in the first half of prompts of 400 tokens."""
    seen = []

    def knowing(model, samples):
        (sample,) = samples
        seen.append(sample)
        half = sample.spans[0].start < len(sample.prompt_ids) / 2
        return [TeacherForced(half and len(sample.prompt_ids) == 400, np.zeros(1))]

    monkeypatch.setattr(module, "teacher_forced", knowing)
    probe = Probe("passkey", Grid([400, 600], [0.0, 100.0], samples=3), Haystack(CODER))
    assert probe.cells(scores(probe, llama)).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert [len(sample.prompt_ids) for sample in seen] == [400] * 6 + [600] * 6
    assert len({sample.answer for sample in seen[:3]}) > 1


def test_the_same_prompts_for_every_model(llama, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        module,
        "teacher_forced",
        lambda m, s: drawn.append(s[0]) or [TeacherForced(True, np.zeros(1))],
    )
    for _ in range(2):
        scores(Probe("passkey", Grid([400], [50.0], samples=4), Haystack(CODER)), llama)
    for one, two in zip(drawn[:4], drawn[4:], strict=True):
        assert one.prompt_ids.tolist() == two.prompt_ids.tolist()


@pytest.mark.parametrize("answers", ["teacher_forced", "generated"])
def test_a_model_that_knows_nothing_finds_nothing(llama, answers):
    grid = Grid([400], [0.0, 50.0], samples=2, answers=answers)
    assert scores(Probe("passkey", grid, Haystack(CODER)), llama) == [0.0] * 4


@pytest.mark.slow
def test_evaluate_writes_probes_beside_the_loss(tmp_path: Path, capsys):
    run, data = runs.alone().folder, [s["folder"] for s in runs.sources().values()]
    settings = Grid([300, 512], [0.0, 50.0, 100.0], samples=1)
    tasks = ["loss", "passkey", "common_words"]
    result = evaluate([str(run)], data, str(tmp_path), tasks, window=256, grid=settings)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["probes"] == result["probes"]
    assert np.shape(stored["probes"]["passkey"][str(run)]) == (2, 3)
    assert np.shape(stored["probes"]["common_words"][str(run)]) == (2, 1)
    assert stored["grid"]["lengths"] == [300, 512]
    assert np.shape(stored["probe_intervals"]["passkey"][str(run)]) == (2, 3, 2)
    for name in tasks[1:]:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        table = (tmp_path / f"{name}.md").read_text()
        assert f"| {name}: tokens | prompts |" in table
        assert table.strip() in capsys.readouterr().out or name != "passkey"
    assert (tmp_path / "loss_by_position.md").is_file()


def test_probes_alone(tmp_path: Path):
    run, data = runs.alone().folder, [s["folder"] for s in runs.sources().values()]
    settings = Grid([300], [50.0], samples=1)
    result = evaluate([str(run)], data, str(tmp_path), ["passkey"], window=256, grid=settings)
    assert "loss" not in result
    assert not (tmp_path / "loss_by_position.md").exists()


@pytest.mark.parametrize(
    ("tasks", "lengths", "message"),
    [
        (["losses"], [300], "task 'losses' unknown; expected one of passkey, needle"),
        (["passkey"], [50], "length 50 is shorter than the prompt"),
    ],
)
def test_impossible_probes_are_refused(tmp_path: Path, tasks, lengths, message):
    run, data = runs.alone().folder, [s["folder"] for s in runs.sources().values()]
    settings = Grid(lengths, [50.0], samples=1)
    with pytest.raises(ValueError, match=message):
        evaluate([str(run)], data, str(tmp_path / "out"), tasks, window=256, grid=settings)
    assert not (tmp_path / "out").exists()


def test_samples_of_the_needle_are_different_and_told(llama):
    grid = Grid([400], [0.0, 100.0], samples=3)
    probe = Probe("needle", grid, Haystack(CODER))
    units = probe.eval_items()
    assert [unit["seed"] for unit in units] == [0, 1, 2] * 2
    assert len({probe.sample(unit).references for unit in units}) == 3
    values = {"a": [1.0, 1.0, 0.0, 0.0, 0.0, 0.0], "b": [1.0] * 6}
    section = probe.report(values, 400)
    assert section.results["probes"]["needle"]["a"] == [[pytest.approx(2 / 3), 0.0]]
    table = section.tables["needle"]
    assert "in every cell: 3 prompts, each with secrets and context of its own; 95 %" in table
    assert "| a: tokens, depth | 0 % | 100 % |" in table
    assert "| 400 | 0.67 [0.21, 0.94] | 0.00 [0.00, 0.56] |" in table
    assert "[–]" not in table


def test_one_prompt_says_why_there_is_no_interval():
    probe = Probe("first_sentence", Grid([800], samples=1), Haystack(CODER))
    probe.eval_items()
    table = probe.report({"a": [0.0], "b": [1.0]}, 400).tables["first_sentence"]
    assert "+1.000 [–]" in table
    assert "[–]: an interval needs two prompts or more that reach there; one does" in table
    assert "raise --grid.samples" in table
    assert "in every cell: 1 prompt; 95 % intervals (Wilson)" in table


def test_a_grid_needs_cells():
    with pytest.raises(ValueError, match="a grid needs lengths, depths and samples"):
        Grid(lengths=[])
