"""benchmarks/gpu.py, as far as a CPU can try it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
gpu: Any = pytest.importorskip("gpu")


@pytest.mark.slow
def test_cells_are_measured_once_and_failures_are_kept(monkeypatch, tmp_path):
    monkeypatch.chdir(Path(__file__).parents[1])
    chosen = [
        {"kind": "step", "who": "ours", "tokens": 512, "documents": 1},
        {"kind": "step", "who": "transformers", "tokens": 512, "documents": 1},
        {"kind": "attention", "backend": "sdpa", "documents": 4, "tokens": 512},
        {"kind": "attention", "backend": "varlen", "documents": 4, "tokens": 512},
    ]
    monkeypatch.setattr(gpu, "cells", lambda tiny: chosen)
    file = tmp_path / "gpu.jsonl"
    for _ in range(2):
        gpu.run_all(file, minutes=10, tiny=True)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [each["cell"] for each in lines] == chosen
    assert all(each["found"]["tokens_per_s"] > 0 for each in lines[:2])
    assert lines[2]["found"]["both"]["tflops"] > 0
    assert "runs on CUDA only" in lines[3]["found"]["error"]
    assert len("\n".join(gpu.report(file)).splitlines()) == 10  # two tables, their heads


@pytest.mark.slow
def test_a_resume_and_the_longest_window_are_tried_by_fit(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    Path("runs").mkdir(exist_ok=True)
    assert gpu.resume({}, True) == {"same_bits": True, "steps": 10}
    assert gpu.longest({"levers": "block, tiled, offloaded"}, True)["runs"]
    assert gpu.loader({}, True)["data_wait_pct"] < 100
