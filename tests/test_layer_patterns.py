"""Patterns of layers as a user writes them: in a config, for `evaluate`, on a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from training import runs

from lit_longctx import cli
from lit_longctx.batch import pack
from lit_longctx.checkpoint import load_pretrained, open_checkpoint
from lit_longctx.checkpoint.description import read_layers
from lit_longctx.decoding import reading
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.cache import Cache
from lit_longctx.model.layers import LayerKind, LayerPattern, Layers
from lit_longctx.position import NoPE, RoPE, YaRN
from lit_longctx.training.module import LanguageModule

LOCAL, GLOBAL = LayerKind(RoPE(1e4), 64), LayerKind(NoPE())
IN_YAML = {
    "layers": ["local", "global"],
    "kinds": {
        "local": {"position": {"class_path": "RoPE", "init_args": {"theta": 1e4}}, "window": 64},
        "global": {"position": {"class_path": "NoPE"}},
    },
}


def test_a_pattern_is_repeated_over_the_depth():
    kinds = {"local": LOCAL, "global": GLOBAL}
    pattern = LayerPattern(["local", "local", "global"], kinds)
    assert pattern.over(8) == Layers((LOCAL, GLOBAL), (0, 0, 1, 0, 0, 1, 0, 0))
    assert LayerPattern(["global"], {"global": GLOBAL}).over(2) == Layers.uniform(NoPE(), 2)
    assert str(pattern) == (
        "[local local global]: local 1 × RoPE(theta=10000.0) in windows of 64, global NoPE()"
    )
    llama = Llama(LlamaConfig(97, 16, 16, 3, 2), LayerPattern(["g"], {"g": LayerKind(RoPE())}))
    assert llama.position == RoPE(1e4)


@pytest.mark.parametrize(
    ("layers", "kinds", "message"),
    [
        (["a", "b"], {"a": GLOBAL}, "layers names b, which is none of the kinds: a"),
        (["a"], {"a": GLOBAL, "b": LOCAL}, "kinds has b, which no layer is; remove it"),
        ([], {}, r"layers names no kind; expected one name or more, such as \[global\]"),
    ],
)
def test_a_pattern_that_describes_no_layers_is_refused(
    layers: list[str], kinds: dict[str, LayerKind], message: str
):
    with pytest.raises(ValueError, match=message):
        LayerPattern(layers, kinds)


def local(**kind: Any) -> dict[str, Any]:
    return {"layers": ["local"], "kinds": {"local": kind}}


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (local(position="NoPE", window=0), "window must be 1 or more; got 0; leave it out"),
        (local(position="Foo"), "kinds: LayerKind: position: no class named Foo; expected one of"),
        (
            local(position={"class_path": "RoPE", "init_args": {"base": 3}}),
            "position: LayerPattern: kinds: LayerKind: position: RoPE: Option 'base' is not acc",
        ),
        (local(position="NoPE") | {"kind": 1}, "LayerPattern: Option 'kind' is not accepted"),
        (local(position="os.system"), "os.system does not correspond to a subclass of Position"),
        ({"theta": 5e5}, "position: a scheme needs its class_path; LayerPattern: Option 'theta'"),
    ],
)
def test_a_pattern_that_cannot_be_read_is_refused_in_one_line(
    position: dict[str, Any], message: str
):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LanguageModule, "model")
    shape = dict(zip(("vocab_size", "hidden_size", "intermediate_size"), (97, 16, 16), strict=True))
    config = shape | {"num_hidden_layers": 2, "num_attention_heads": 2}
    model = {"class_path": "ContinualPretrain", "init_args": {"config": config}}
    model["init_args"]["position"] = position
    with pytest.raises((ValueError, ArgumentError)) as found:
        parser.instantiate(parser.parse_object({"model": model}))
    line = cli.one_line(found.value)
    assert message in line
    assert "abstract" not in line


@pytest.mark.slow
def test_one_scheme_on_a_checkpoint_of_windows_leaves_the_windows(run_of_a_pattern: runs.Ran):
    opened = open_checkpoint(run_of_a_pattern.folder)
    assert opened.layers_with(RoPE()) == Layers((LOCAL, LayerKind(RoPE(1e4))), (0, 1))
    pattern = LayerPattern(["all"], {"all": LayerKind(YaRN(factor=2))})
    scheme = YaRN(1e4, factor=2, original_context=runs.WINDOW)
    assert opened.layers_with(pattern) == Layers.uniform(scheme, 2)


@pytest.fixture(scope="module")
def run_of_a_pattern(tmp_path_factory: pytest.TempPathFactory) -> runs.Ran:
    folder = tmp_path_factory.mktemp("pattern")
    model = {"class_path": "ContinualPretrain", "init_args": {"position": IN_YAML}}
    (folder / "pattern.yaml").write_text(yaml.safe_dump({"model": model}))
    steps = ["--trainer.max_steps", 6]
    ran = runs.fit(folder / "run", "--config", folder / "pattern.yaml", *steps)
    return ran.succeeded()


@pytest.mark.slow
def test_a_run_trains_what_its_config_says(run_of_a_pattern: runs.Ran):
    line = "position: 1 × RoPE(theta=10000.0) in windows of 64, 1 × NoPE()"
    assert line in run_of_a_pattern.out.splitlines()
    step = run_of_a_pattern.folder / "checkpoints" / "step-00000006"
    assert json.loads((step / "model.json").read_text())["layers"]["kind_of"] == [0, 1]
    assert open_checkpoint(step).layers == Layers((LOCAL, GLOBAL), (0, 1))


@torch.no_grad()
def test_a_run_is_read_in_parts_as_in_one(run_of_a_pattern: runs.Ran):
    llama = load_pretrained(run_of_a_pattern.folder)
    ids = torch.randint(0, 256, (2, 200))
    whole = llama.logits(reading(ids))
    cache = Cache(2, planned=200)
    parts = [
        llama.logits(reading(part, cache.length), cache) for part in ids.split((130, 1, 69), 1)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    packed = torch.cat([torch.full((2, 1), 256), ids], 1)
    packed[:, 100] = 256
    alone = llama.logits(reading(packed[:, 100:200]))
    together = llama.logits(pack(packed, bos=256))[:, 100:]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_evaluate_measures_a_pattern_beside_others(run_of_a_pattern: runs.Ran, tmp_path: Path):
    everywhere: dict[str, Any] = {"layers": ["all"], "kinds": {"all": {"position": "NoPE"}}}
    options = {
        "checkpoint": [str(run_of_a_pattern.folder)],
        "data": [runs.sources()["prose"]["folder"]],
        "output": str(tmp_path / "out"),
        "window": 256,
        "windows": 2,
        "positions": [IN_YAML, everywhere],
    }
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(options))
    ran = runs.run("evaluate", "--config", tmp_path / "evaluate.yaml").succeeded()
    own, same, other = json.loads((tmp_path / "out" / "results.json").read_text())["loss"].values()
    assert own == same != other
    assert "[RoPE(theta=10000.0) in windows of 64, NoPE()] | " in ran.out


def test_a_class_that_a_kind_of_layer_names_is_not_called():
    scheme = {"class_path": "os.system", "init_args": {"command": "true"}}
    described = {"layers": {"kinds": [{"position": scheme, "window": None}], "kind_of": [0]}}
    with pytest.raises(ValueError, match=r"os\.system is none of lit_longctx"):
        read_layers(described, LlamaConfig(97, 16, 16, 1, 2))
