"""Every shipped config, by the parsers that run it; its data and checkpoint need not be there."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lit_longctx import cli
from lit_longctx.checkpoint import open_checkpoint
from lit_longctx.data.sampling.stages import Stage
from lit_longctx.model import Llama
from lit_longctx.position import LongRoPE, NTKAware
from lit_longctx.training import fit
from lit_longctx.training.hardware import SHAPES
from lit_longctx.training.module import LanguageModule

CONFIGS = {path.stem: path for path in (Path(__file__).parents[1] / "config").glob("*.yaml")}
CONTENT = {name: yaml.safe_load(path.read_text()) for name, path in sorted(CONFIGS.items())}
RUNS = [name for name, content in CONTENT.items() if "model" in content]
OTHERS = [name for name in CONTENT if name not in RUNS]

LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA3 = {
    **LLAMA,
    "vocab_size": 128_256,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}
CHECKPOINTS = {
    "checkpoints/llama2-7b": {
        **LLAMA,
        "vocab_size": 32_000,
        "intermediate_size": 11_008,
        "max_position_embeddings": 4096,
        "rope_theta": 10_000.0,
    },
    "exports/key_values_start": {
        "vocab_size": 2798,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "rope_theta": 10_000.0,
    },
    "checkpoints/llama2-7b-64k": {
        **LLAMA,
        "vocab_size": 32_000,
        "intermediate_size": 11_008,
        "max_position_embeddings": 65_536,
        "rope_theta": 2_000_000.0,
    },
    "checkpoints/smollm2": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "rope_theta": 100_000.0,
    },
    "checkpoints/llama3-8b-instruct": LLAMA3,
    "checkpoints/llama3-8b": LLAMA3,
    "checkpoints/llama3.1-8b-instruct": {
        **LLAMA3,
        "max_position_embeddings": 131_072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "checkpoints/smollm-360m": {
        "vocab_size": 49_152,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
    },
    "checkpoints/smollm3-3b-4k": {
        "model_type": "smollm3",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        "rope_theta": 50_000.0,
    },
    "checkpoints/olmo3-7b-8k": {
        "model_type": "olmo3",
        **LLAMA,
        "vocab_size": 100_278,
        "intermediate_size": 11_008,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "rope_theta": 500_000.0,
    },
    "checkpoints/qwen2.5-7b-4k": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rope_theta": 10_000.0,
    },
    "checkpoints/gemma3-4b-32k": {
        "model_type": "gemma3_text",
        "vocab_size": 262_208,
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "sliding_window": 1024,
        "rope_theta": 1_000_000.0,
    },
}
"""config.json of what configs start from, besides runs of other configs."""


class Parsed(fit.CLI):
    """The real command line, stopped before it builds anything."""

    def before_instantiate_classes(self):
        pass

    def instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        Parsed.last = self


def config_json(checkpoint):
    """What the checkpoint's config.json would say."""
    if checkpoint in CHECKPOINTS:
        return CHECKPOINTS[checkpoint]
    model = CONTENT[Path(checkpoint).name]["model"]["init_args"]
    return model["config"] if "config" in model else config_json(model["checkpoint"])


@pytest.fixture
def options(request, monkeypatch, tmp_path):
    """Options of one run, its checkpoint replaced by a folder that holds config.json alone."""
    monkeypatch.setattr(fit, "CLI", Parsed)
    monkeypatch.setattr("sys.argv", ["lit_longctx"])  # Lightning warns of pytest's arguments
    fit.fit(["fit", "--config", str(CONFIGS[request.param])])
    command = Parsed.last
    model = command.config.fit.model
    if checkpoint := model.init_args.checkpoint:
        (tmp_path / "config.json").write_text(json.dumps(config_json(checkpoint)))
        model.init_args.checkpoint = str(tmp_path)
    return command.config.fit


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_line_says_what_and_which_paper(name):
    first = CONFIGS[name].read_text().splitlines()[0]
    assert first.startswith("# ")
    assert re.search(r"\(.*(\d{4}|no paper).*\)", first), first


@pytest.mark.fast_cases(7)
@pytest.mark.parametrize("options", RUNS, indirect=True)
def test_a_run_fits_together(options):
    model, data, trainer = options.model, options.data.init_args, options.trainer
    assert data.window % 256 == 0
    assert data.batch_tokens % (data.window * data.micro_batch_size) == 0
    weights = [source.weight for source in data.sources.values()]
    assert weights == [None] * len(weights) or sum(weights) == pytest.approx(1)
    assert trainer.max_steps > 0
    assert trainer.default_root_dir.startswith("runs/")

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LanguageModule, "model")
    module = parser.instantiate(parser.parse_object({"model": model})).model
    with torch.device("meta"):
        llama = Llama(module.config, module.layers, module.attn_implementation)
    assert all(parameter.is_meta for parameter in llama.parameters())
    places = torch.tensor([[0, data.window - 1]])
    for kind in module.layers.kinds:
        assert kind.position.encode(places, module.config.head_width).isfinite().all()


def test_shapes_of_plans_are_those_of_the_checkpoints(tmp_path):
    """What decides sizes and products is what config.json makes of it."""
    beside = ("bos_token_id", "eos_token_id", "rms_norm_eps", "max_position_embeddings")
    for name in RUNS:
        checkpoint = CONTENT[name]["model"]["init_args"].get("checkpoint")
        shape = CONTENT[name].get("plan", {}).get("shape")
        if checkpoint is None or shape is None:
            continue
        (tmp_path / "config.json").write_text(json.dumps(config_json(checkpoint)))
        found = dataclasses.asdict(open_checkpoint(tmp_path).config)
        for key, value in dataclasses.asdict(SHAPES[shape]).items():
            if key not in beside:
                assert found[key] == value, (name, key)


def test_the_placeholder_divisors_follow_the_rule_beside_them():
    position = CONTENT["longrope_128k"]["model"]["init_args"]["position"]["init_args"]
    found = LongRoPE(**position).frequencies(128, length=131_072)
    torch.testing.assert_close(found, NTKAware(factor=32).frequencies(128), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", OTHERS)
def test_other_verbs_take_their_config(name):
    verb = name.rsplit("_", 1)[-1]
    function = cli._function(verb)
    taken = {}

    def take(**options):
        taken.update(options)

    take.__signature__ = inspect.signature(function)
    cli.call(take, verb, ["--config", str(CONFIGS[name])])
    for key, value in CONTENT[name].items():
        found = taken[key]
        if isinstance(value, dict) and "class_path" in value:
            assert type(found).__name__ == value["class_path"]
            value = {k: v for k, v in value["init_args"].items() if not isinstance(v, dict)}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            assert [type(each).__name__ for each in found] == [v["class_path"] for v in value]
            continue
        if dataclasses.is_dataclass(found):
            assert value.items() <= dataclasses.asdict(found).items()
        else:
            assert found == value


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    "options",
    ["prolong_512k", "curriculum_32k", "key_values_short", "smollm3_64k", "qwen25_1m"],
    indirect=True,
)
def test_stages_fit_together(options):
    init = options.data.init_args
    run = Stage(1, init.window, init.batch_tokens, init.micro_batch_size)
    stages = [Stage(**vars(stage)).completed(run) for stage in init.stages]
    assert sum(stage.steps for stage in stages) == options.trainer.max_steps
    assert max(stage.window for stage in stages) <= 2**22  # the chunks that prepare writes
    for stage in stages:
        assert stage.batch_tokens % (stage.window * stage.micro_batch_size) == 0
        if stage.weights:
            assert set(stage.weights) <= set(init.sources)
            assert sum(stage.weights.values()) == pytest.approx(1)
