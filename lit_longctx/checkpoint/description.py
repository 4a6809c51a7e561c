"""The model as a run's checkpoint describes it: config, position schemes, trained context."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lit_longctx.checkpoint.trust import Untrusted, scheme_named
from lit_longctx.json_file import error_text, read_object
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.layers import LayerKind, LayerPattern, Layers
from lit_longctx.position import PositionScheme, QueryTemperature

MODEL = "model.json"
"""File in a run's checkpoint that describes the model: config, position scheme, trained context."""


def describe(llama: Llama, context: int | None) -> dict[str, Any]:
    """Return what MODEL holds: enough to rebuild the model without the run's YAML."""
    return {
        "config": asdict(llama.config),
        **describe_layers(llama.layers),
        "context": context,
        "torch": torch.__version__,
    }


def describe_layers(layers: Layers) -> dict[str, Any]:
    """Return `position` where one scheme describes all layers, else `layers`."""
    if layers.are_uniform:
        return {"position": describe_position(layers.position)}
    kinds = [_describe_kind(kind) for kind in layers.kinds]
    return {"layers": {"kinds": kinds, "kind_of": list(layers.kind_of)}}


def _describe_kind(kind: LayerKind) -> dict[str, Any]:
    found = {"position": describe_position(kind.position), "window": kind.window}
    temperature = kind.query_temperature
    return {**found, "query_temperature": asdict(temperature)} if temperature else found


def _kind(description: dict[str, Any]) -> LayerKind:
    temperature = description.get("query_temperature")
    return LayerKind(
        _scheme(description["position"]),
        description["window"],
        temperature and QueryTemperature(**temperature),
    )


def describe_position(position: PositionScheme | LayerPattern) -> dict[str, Any]:
    """Return a scheme as class_path and init_args, or a pattern, in the form configs use."""
    if isinstance(position, LayerPattern):
        kinds = {name: _describe_kind(kind) for name, kind in position.kinds.items()}
        return {"layers": list(position.layers), "kinds": kinds}
    kind = type(position)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": vars(position)}


def scaled_alike(origin: dict[str, Any], layers: Layers) -> bool:
    """Whether layers stretch positions as those that their run started from did."""
    if not layers.are_uniform or "position" not in origin:
        return False
    told, now = origin["position"], describe_position(layers.position)
    factors = [scheme["init_args"].get("factor") for scheme in (told, now)]
    return told["class_path"] == now["class_path"] and factors[0] == factors[1]


def read_model(
    file: Path,
) -> tuple[LlamaConfig, Layers, dict[str, Any] | None, int | None]:
    """Return what MODEL describes: config, layers, what the run started from, trained context.

    Raises:
        ValueError: It describes no model; the file is named.
    """
    description = read_object(file)
    try:
        config = LlamaConfig(**description["config"])
        layers = read_layers(description, config)
        for kind in layers.kinds:
            kind.position.check(config.head_width)
        origin, context = description.get("started_from"), description["context"]
        if not isinstance(origin, dict | None) or not isinstance(context, int | None):
            raise ValueError("started_from and context describe no start")
    except Untrusted:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} describes no model: {error_text(error)}") from None
    return config, layers, origin, context


def read_layers(description: dict[str, Any], config: LlamaConfig) -> Layers:
    """Return the kinds of layers that MODEL describes, and which layer is of which kind."""
    if "layers" not in description:
        return Layers.uniform(_scheme(description["position"]), config.num_hidden_layers)
    kinds = description["layers"]["kinds"]
    return Layers(
        tuple(_kind(kind) for kind in kinds),
        tuple(description["layers"]["kind_of"]),
    )


def _scheme(description: dict[str, Any]) -> PositionScheme:
    return scheme_named(description["class_path"])(**description["init_args"])
