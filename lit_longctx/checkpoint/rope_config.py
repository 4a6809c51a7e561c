"""Position schemes ↔ config.json: one meaning, in the places where each program looks for it.

transformers 5 keeps everything in `rope_parameters`, but lets a `rope_scaling` beside it win;
transformers 4 reads `rope_scaling`, `rope_theta` and, for LongRoPE, a top-level
`original_max_position_embeddings`. What is read here has one meaning in all of them, or is refused.
"""

from math import isclose, isfinite
from typing import Any

from lit_longctx.position import (
    DynamicNTK,
    Llama3,
    LongRoPE,
    PositionInterpolation,
    ProportionalRoPE,
    RoPE,
    Rotary,
    YaRN,
)
from lit_longctx.position.rotary import ORIGINAL
from lit_longctx.position.scheme import THETA, PositionScheme

SCHEMES = {
    str(scheme.rope_type): scheme
    for scheme in (
        RoPE,
        PositionInterpolation,
        DynamicNTK,
        YaRN,
        Llama3,
        LongRoPE,
        ProportionalRoPE,
    )
}
"""By Hugging Face's rope_type."""
INERT = {"finetuned"}
"""Keys that no program reads."""
NEUTRAL = {
    "rope_interleaved": False,
    "rotary_pct": 1.0,
    "partial_rotary_factor": 1.0,
    "rope_ratio": 1.0,
    "alibi": False,
}
"""Keys of other families beside which a Llama is still a Llama, if they have this value."""


# ---- in


def read_position(config: dict[str, Any], theta: float = THETA) -> Rotary:
    """Return the scheme that config.json describes.

    Args:
        config: What config.json holds.
        theta: Rotary base where it names none.

    Raises:
        ValueError: A key that no scheme here can represent, or one that is no number; two places
            that say different things.
    """
    for key, value in NEUTRAL.items():
        if config.get(key, value) not in (value, None):
            raise ValueError(f"key {key} {config[key]} cannot be represented; expected {value}")
    rope = _settings(config, theta)
    kind = rope.pop("rope_type")
    if kind not in SCHEMES:
        raise ValueError(
            f"rope_type {kind!r} cannot be represented; expected one of {', '.join(SCHEMES)}"
        )
    position = SCHEMES[kind].from_rope(rope, config.get("max_position_embeddings", 2048))
    if (partial := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"rope key partial_rotary_factor {partial} cannot be represented")
    _check_attention(position, rope)
    if rope.get("truncate") is True:
        del rope["truncate"]
    if rope:
        raise ValueError(f"rope key {sorted(rope)[0]} cannot be represented with rope_type {kind}")
    return position


def _settings(config: dict[str, Any], theta: float) -> dict[str, Any]:
    """Return the rope settings of whichever place holds them; ValueError if two disagree."""
    found: dict[str, dict[str, Any]] = {}
    for place in ("rope_parameters", "rope_scaling"):
        told = config.get(place)
        if told and not isinstance(told, dict):
            raise ValueError(f"{place} is {told!r}, expected an object")
        if told:
            found[place] = _completed(place, told, config, theta)
    if not found:
        return _completed("config.json", {}, config, theta)
    new, old = next(iter(found.values())), list(found.values())[-1]
    if new != old:
        raise ValueError(
            f"rope_parameters says {_short(new)}, rope_scaling {_short(old)}; remove one of them "
            "(transformers would take rope_scaling)"
        )
    return new


def _completed(
    place: str, told: dict[str, Any], config: dict[str, Any], theta: float
) -> dict[str, Any]:
    """Return settings of one place, with what stands beside it, checked to be numbers."""
    rope = {key: value for key, value in told.items() if value is not None and key not in INERT}
    kinds = {rope.pop(key) for key in ("type", "rope_type") if key in rope} or {"default"}
    if len(kinds) > 1:
        raise ValueError(f"{place} has type and rope_type, {' and '.join(sorted(kinds))}; keep one")
    rope["rope_type"] = kinds.pop()
    scheme = SCHEMES.get(rope["rope_type"], Rotary)
    keys: dict[str, float | None] = {"rope_theta": theta}
    if "original_context" in scheme.rope_fields:
        keys[ORIGINAL] = None
    else:
        rope.pop(ORIGINAL, None)  # no program reads it for such schemes
    for key, default in keys.items():
        beside = config.get(key)
        if None not in (beside, rope.get(key)) and beside != rope[key]:
            raise ValueError(
                f"{key} is {rope[key]} in {place}, {beside} beside it; expected one value"
            )
        value = rope.get(key, default if beside is None else beside)
        if value is not None:
            rope[key] = value
    for key, value in rope.items():
        if key == "truncate" and not isinstance(value, bool):
            raise ValueError(f"rope key truncate is {value!r}, expected true or false")
        if key not in ("rope_type", "truncate"):
            check_number(key, value)
    return rope


def check_number(key: str, value: Any) -> None:
    """Raise ValueError unless a rope key's value is a finite number, or a list of them."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float) or not isfinite(number):
            raise ValueError(f"rope key {key} is {number!r}, expected a number")


def check_by_type(position: PositionScheme) -> None:
    """Refuse what programs differ in where rope settings are by type of layer."""
    if isinstance(position, YaRN) and not position.truncate:
        raise ValueError(
            "rope key truncate false cannot be represented by type of layer: transformers 5 looks "
            "for it beside the types"
        )


def _short(rope: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in sorted(rope.items()) if not isinstance(v, list))


def _check_attention(position: Rotary, rope: dict[str, Any]) -> None:
    """Take out the keys that decide the attention factor; ValueError if it is not the scheme's."""
    own = position.attention_scaling
    told = {key: rope.pop(key) for key in ("attention_factor",) if key in rope}
    if isinstance(position, LongRoPE):
        told |= {key: rope.pop(key) for key in ("short_mscale", "long_mscale") if key in rope}
    for key, factor in told.items():
        if not isclose(factor, own, rel_tol=1e-6):
            raise ValueError(
                f"rope key {key} {factor} cannot be represented; {position.rope_type} here has "
                f"{own:.6g}"
            )


# ---- out


def rope_keys(position: PositionScheme, head_dim: int, context: int) -> dict[str, Any]:
    """Return all keys of config.json that bear on positions, for transformers 4 and 5 alike.

    Args:
        position: The scheme.
        head_dim: Features per head.
        context: The new max_position_embeddings, from which some programs take the factor.

    Raises:
        ValueError: Hugging Face has no such scheme, or versions of transformers would differ.
    """
    rope = position.to_rope(head_dim)
    theta = float(rope.pop("rope_theta"))
    if isinstance(position, DynamicNTK):
        # transformers scales from here: raising it would switch the scaling off
        context = position.known_context
    if isinstance(position, YaRN | LongRoPE):
        reach = position.factor * position.known_context
        fits = isclose(context, reach, rel_tol=1e-6)
        if isinstance(position, LongRoPE):
            rope["attention_factor"] = position.attention_scaling
            if not fits:  # vLLM's names; it would take the factor from the context
                rope |= dict.fromkeys(("short_mscale", "long_mscale"), position.attention_scaling)
        elif not fits:
            raise ValueError(
                f"transformers before 4.56 takes YaRN's factor from the context: expected a "
                f"context of {reach:,.0f} (factor {position.factor:g} × "
                f"{position.known_context:,}), got {context:,}; export with context {reach:.0f}"
            )
    beside = {ORIGINAL: rope[ORIGINAL]} if ORIGINAL in rope else {}
    return {
        "max_position_embeddings": context,
        "rope_parameters": {**rope, "rope_theta": theta},
        "rope_theta": theta,
        "rope_scaling": rope if rope["rope_type"] != "default" else None,
        **beside,
    }
