"""Query temperature ↔ config.json, as Ministral 3 has it: beside the rope settings."""

from typing import Any

from lit_longctx.checkpoint.rope_config import check_number
from lit_longctx.model.layers import Layers
from lit_longctx.position import QueryTemperature
from lit_longctx.position.rotary import ORIGINAL

PLACES = ("rope_parameters", "rope_scaling")
BETA = "llama_4_scaling_beta"
BESIDE = (BETA, "max_position_embeddings")
"""Keys of Ministral's rope settings that are no part of a scheme."""


def read_temperature(config: dict[str, Any]) -> QueryTemperature:
    """Return what config.json says; transformers has no Ministral without it.

    Raises:
        ValueError: A value is missing, or two places differ.
    """
    found = {
        (place[BETA], place[ORIGINAL])
        for name in PLACES
        if (place := config.get(name)) and BETA in place and ORIGINAL in place
    }
    if len(found) != 1:
        raise ValueError(f"rope_parameters must have one {BETA} and one {ORIGINAL}; got {found}")
    beta, floor_scale = found.pop()
    check_number(BETA, beta)
    check_number(ORIGINAL, floor_scale)
    return QueryTemperature(floor_scale, beta)


def without_temperature(config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with rope settings that are those of a scheme alone."""
    plain = {
        name: {key: value for key, value in place.items() if key not in BESIDE}
        for name in PLACES
        if (place := config.get(name))
    }
    return {**config, **plain}


def with_temperature(rope: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """Return rope keys with the temperature that all layers share.

    Args:
        rope: The scheme's keys of config.json.
        layers: Layers of the model.

    Raises:
        ValueError: It is not Ministral's: other in some layers, counted from 1, or with a step that
            is not the scheme's original context.
    """
    temperatures = {kind.query_temperature for kind in layers.kinds}
    shared = temperatures.pop()
    if temperatures or shared is None or shared.offset:
        raise ValueError("has one query temperature with offset 0 in all layers; got others")
    settings = {BETA: float(shared.attn_scale), ORIGINAL: shared.floor_scale}
    if rope["rope_parameters"].get(ORIGINAL, shared.floor_scale) != shared.floor_scale:
        raise ValueError(
            f"has a query temperature by the original context {rope['rope_parameters'][ORIGINAL]}; "
            f"got floor_scale {shared.floor_scale}"
        )
    return rope | {name: {**rope[name], **settings} for name in PLACES if rope[name]}
