"""The exported context: never below the start's, what was trained, or the scheme's reach."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lit_longctx.checkpoint import (
    MODEL,
    describe_layers,
    export_pretrained,
    load_pretrained,
    open_checkpoint,
)
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.layers import Layers
from lit_longctx.position import DynamicNTK, Llama3, NTKAware, PositionInterpolation, RoPE, YaRN

SHAPE = LlamaConfig(97, 16, 16, 1, 2, max_position_embeddings=8192)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a model of 8,192 tokens."""
    llama = Llama(SHAPE, RoPE(1e5))
    return export_pretrained(llama, tmp_path_factory.mktemp("start") / "hf", context=8192)


def written(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["max_position_embeddings"]


@pytest.mark.parametrize(
    ("position", "context"),
    [
        (None, 8192),
        (RoPE(5e5), 8192),
        (YaRN(factor=2), 16_384),
        (YaRN(factor=8, original_context=4096), 32_768),
        (PositionInterpolation(factor=4), 32_768),
        (NTKAware(factor=4), 32_768),
        (Llama3(factor=4, original_context=1024), 8192),
        (DynamicNTK(factor=4), 8192),  # from there transformers stretches
    ],
    ids=str,
)
def test_in_python(position, context: int, start: Path, tmp_path: Path):
    folder = export_pretrained(load_pretrained(start, position), tmp_path / "a")
    assert written(folder) == context
    again = export_pretrained(load_pretrained(folder), tmp_path / "b")
    assert written(again) == context  # and does not grow from export to export


def run_of(
    start: Path, tmp_path: Path, trained: int, position, before: int | None, origin=RoPE(1e5)
):
    """Return the checkpoint of a run, but for its weights."""
    opened, folder = open_checkpoint(start), tmp_path / "run" / "checkpoints" / "step-1"
    folder.mkdir(parents=True)
    (folder / MODEL).write_text("{}")
    layers = Layers.uniform(position, 1)
    told = before and {**describe_layers(Layers.uniform(origin, 1)), "context": before}
    return replace(opened, path=folder, layers=layers, trained_context=trained, origin=told)


@pytest.mark.parametrize(
    ("trained", "position", "before", "context", "why"),
    [
        (8192, YaRN(1e5, factor=2, original_context=8192), 8192, 16_384, "the reach of YaRN, "),
        (8192, RoPE(5e5), 8192, 8192, "the start's"),
        (32_768, RoPE(5e5), 8192, 32_768, "the longest that was trained"),
        (65_536, YaRN(1e5, factor=2, original_context=8192), 8192, 65_536, "the longest that was"),
        (8192, PositionInterpolation(1e5, factor=4), 8192, 32_768, "factor 4 × 8,192"),
        (256, RoPE(1e5), None, 256, "the longest that was trained"),  # random weights: no start
        (256, YaRN(1e5, factor=2, original_context=512), None, 1024, "the reach of YaRN"),
        (256, PositionInterpolation(1e5, factor=4), None, 256, "the longest that was trained"),
    ],
    ids=str,
)
def test_of_a_run(trained, position, before, context, why, start: Path, tmp_path: Path):
    opened = run_of(start, tmp_path, trained, position, before)
    found, reason = opened.context_with(opened.layers)
    assert found == context
    assert why in reason


def test_a_run_that_goes_on_with_its_starts_factor_stretches_no_further(
    start: Path, tmp_path: Path
):
    scheme = PositionInterpolation(1e5, factor=4)
    opened = run_of(start, tmp_path, 32_768, replace(scheme, theta=2e5), 32_768, scheme)
    assert opened.context_with(opened.layers)[0] == 32_768
    assert opened.context_with(Layers.uniform(YaRN(1e5, factor=8, original_context=8192), 1)) == (
        65_536,
        "the reach of YaRN, factor 8 × 8,192",
    )


def test_without_a_start_the_config_or_the_reach_says_it(tmp_path: Path):
    for number, (position, context) in enumerate(
        (
            (RoPE(), 8192),
            (Llama3(factor=8, original_context=512), 8192),
            (Llama3(factor=8, original_context=2048), 16_384),
            (YaRN(factor=4, original_context=1024), 4096),
            (YaRN(factor=4), 32_768),
        )
    ):
        folder = export_pretrained(Llama(SHAPE, position), tmp_path / str(number))
        assert written(folder) == context


def test_a_context_that_is_given_is_taken(start: Path, tmp_path: Path):
    assert written(export_pretrained(load_pretrained(start), tmp_path / "a", context=4096)) == 4096
