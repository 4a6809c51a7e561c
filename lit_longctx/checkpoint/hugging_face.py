"""config.json ↔ LlamaConfig and layers: what Hugging Face can say of a model."""

from dataclasses import asdict, fields
from importlib import import_module
from importlib.util import find_spec
from math import isclose
from pathlib import Path
from typing import Any

import torch

from lit_longctx.checkpoint.families import FAMILIES, FULL, SLIDING, Family
from lit_longctx.checkpoint.temperature_config import (
    read_temperature,
    with_temperature,
    without_temperature,
)
from lit_longctx.json_file import error_text, read_object
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.layers import LayerKind, Layers
from lit_longctx.position import Rotary
from lit_longctx.position.scheme import KEEP_THE_RUN

TOKENS = ("bos_token_id", "eos_token_id")

# ---- in


def read_config(folder: Path) -> tuple[LlamaConfig, Layers]:
    """Read config.json; refuses by name whatever would make another model of it than it is."""
    told = read_object(folder / "config.json")
    name = told.get("model_type", "llama")
    if name not in FAMILIES:
        raise ValueError(
            f"{folder}/config.json: model_type is {name!r}, expected one of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[name]
    expected = {family.activation_key: family.fixed["hidden_act"], "mlp_bias": False}
    for key, value in expected.items():
        if told.get(key, value) != value:
            raise ValueError(f"{folder}/config.json: {key} is {told[key]!r}, expected {value!r}")
    config = {**family.defaults, **told}
    try:
        shape = _shape(family, name, config)
        layers = _layers(family, config)
        for kind in layers.kinds:
            kind.position.check(shape.head_width)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{folder}/config.json: {error_text(error)}") from None
    return shape, layers


def _shape(family: Family, name: str, config: dict[str, Any]) -> LlamaConfig:
    for key, value in family.neutral.items():
        if config.get(key, value) not in (value, None):
            raise ValueError(f"key {key} {config[key]} cannot be represented; expected {value}")
    told = {f.name for f in fields(LlamaConfig)} - family.fixed.keys()
    open_ids = TOKENS if name != "llama" else ()
    given: dict[str, Any] = {
        k: v for k, v in config.items() if k in told and (v is not None or k in open_ids)
    }
    for key in TOKENS:
        if isinstance(given.get(key), list):  # Llama 3.1 has several ends; the text's is the first
            given[key] = next(iter(given[key]), None)
    shape: dict[str, Any] = {**given, **family.fixed, "model_type": name}
    return LlamaConfig(**shape)


def _layers(family: Family, config: dict[str, Any]) -> Layers:
    temperature = read_temperature(config) if family.has_query_temperature else None
    config = without_temperature(config) if temperature else config
    types = family.types(config)
    if told := config.get("layer_types"):
        if family.reads_types:
            types = told
        elif told != types:
            raise ValueError(f"layer_types {told} cannot be represented; expected {types}")
    number = config["num_hidden_layers"]
    if len(types) != number or set(types) - {FULL, SLIDING}:
        expected = f"expected {number} times {FULL} or {SLIDING}"
        raise ValueError(f"layer_types {types} cannot be represented; {expected}")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if SLIDING in types and window is None:
        raise ValueError(f"layer_types has {SLIDING}, but there is no sliding_window in use")
    schemes = family.schemes(config, list(types), family.theta)
    return Layers.of(
        [
            LayerKind(scheme, window if kind == SLIDING else None, temperature)
            for scheme, kind in zip(schemes, types, strict=True)
        ]
    )


# ---- out


def config_json(llama: Llama, context: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json of the model's family, or of the first other that can tell it.

    With the rope keys of transformers 4 and 5.

    Raises:
        ValueError: No family has such a model; it says why the model's own has not.
    """
    own = llama.config.model_type
    names = [own, *(name for name in FAMILIES if name != own)]
    reasons: list[str] = []
    for name in names:
        try:
            return _config_of(name, llama, context, dtype)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[0])


def _config_of(name: str, llama: Llama, context: int, dtype: torch.dtype) -> dict[str, Any]:
    config, layers = llama.config, llama.layers
    if name not in FAMILIES:
        raise ValueError(f"model_type {name} is none of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    shape = asdict(config)
    for key, value in family.fixed.items():
        if shape.pop(key) != value:
            raise ValueError(
                f"Hugging Face's {family.prefix} has {key} {value}; got {getattr(config, key)}; "
                f"{KEEP_THE_RUN}"
            )
    tempered = any(kind.query_temperature for kind in layers.kinds)
    if tempered and not family.has_query_temperature:
        raise ValueError(
            f"Hugging Face's {family.prefix} has no query temperature; train without one, or "
            f"{KEEP_THE_RUN}"
        )
    windows = sorted({kind.window for kind in layers.kinds if kind.window is not None})
    types = [FULL if kind.window is None else SLIDING for kind in layers.by_layer]
    try:
        if len(windows) > 1:
            raise ValueError(f"has one window; got {windows}")
        keys = family.window_keys(types, windows[0] if windows else None)
        rope = family.scheme_keys(layers, config.head_width, context)
        rope = with_temperature(rope, layers) if family.has_query_temperature else rope
    except ValueError as error:
        if len(layers.kinds) == 1 and not windows:
            raise
        raise ValueError(
            f"Hugging Face's {family.prefix} cannot represent layers that differ: {layers}: "
            f"{error}; {KEEP_THE_RUN}"
        ) from None
    return {
        "architectures": [family.architecture],
        **({} if name == "llama" else {"pad_token_id": None}),  # others have one by default
        **shape,
        "model_type": name,
        **{key: value for key, value in family.shape.items() if key == "attention_bias"},
        **rope,
        **keys,
        family.activation_key: family.fixed["hidden_act"],
        "mlp_bias": False,
        "initializer_range": 0.02,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def compare_with_transformers(folder: Path, llama: Llama) -> None:
    """Reload a folder in transformers, if installed; ValueError if it reads other layers."""
    if not find_spec("transformers"):
        return
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    prefix = FAMILIES[config.model_type].prefix
    module = import_module(f"transformers.models.{prefix.lower()}.modeling_{prefix.lower()}")
    theirs = getattr(module, f"{prefix}RotaryEmbedding")(config)
    for kind in llama.layers.kinds:
        if isinstance(kind.position, Rotary) and not _is_same(theirs, config, kind, llama):
            raise ValueError(
                f"transformers reads other positions from the exported folder than {kind.position};"
                " this is a bug here or there; nothing was written"
            )


def _is_same(theirs: Any, config: Any, kind: LayerKind, llama: Llama) -> bool:
    """Whether a rotary embedding of transformers has the frequencies of a kind of layer."""
    position, head_dim = kind.position, llama.config.head_width
    assert isinstance(position, Rotary)
    name = FULL if kind.window is None else SLIDING
    by_type = hasattr(theirs, f"{name}_inv_freq")
    of, given = (f"{name}_", (name,)) if by_type else ("", ())
    same = isclose(getattr(theirs, f"{of}attention_scaling"), position.attention_scaling)
    for length in (1, 4 * config.max_position_embeddings):  # some schemes differ for long documents
        theirs(torch.zeros(1), torch.tensor([[length - 1]]), *given)
        found = getattr(theirs, f"{of}inv_freq").float()
        ours = position.frequencies(head_dim, length)
        same &= torch.allclose(found, ours, rtol=1e-6, atol=0)
    return same
