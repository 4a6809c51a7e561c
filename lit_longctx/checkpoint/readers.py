"""Which keys of config.json other programs read, and where they cannot read what is exported.

Looked up in the sources named here; the programs themselves are not needed.
"""

from dataclasses import dataclass
from typing import Any

from lit_longctx.position.rotary import ORIGINAL

NEW, OLD = "rope_parameters", "rope_scaling"
YARN = ("factor", ORIGINAL, "beta_fast", "beta_slow")
LLAMA3 = ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor")
LONGROPE = ("short_factor", "long_factor", ORIGINAL)


@dataclass(frozen=True)
class ConsumerProgram:
    """Where one program looks for the settings of each rope type."""

    name: str
    source: str
    """File and version that was looked up."""
    keys: dict[str, tuple[str, ...]]
    """Dotted keys by rope type; every one of them must be there."""
    multiplied: tuple[str, ...] = ()
    """Keys of YaRN that it multiplies with what it derives itself."""
    unread: tuple[str, ...] = ()
    """Keys of YaRN that it does not heed."""
    otherwise: dict[str, str] | None = None
    """Rope types that it reads as another model, and how."""


def _in(place: str, *keys: str) -> tuple[str, ...]:
    return tuple(f"{place}.{key}" for key in ("rope_type", *keys))


def _keys(place: str, theta: str, longrope: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    """Return where a program that reads all of `place` looks, by rope type."""
    context = "max_position_embeddings"
    return {
        "default": (theta, context),
        "linear": (theta, context, *_in(place, "factor")),
        "dynamic": (theta, context, *_in(place, "factor")),
        "yarn": (theta, context, *_in(place, *YARN)),
        "llama3": (theta, context, *_in(place, *LLAMA3)),
        "longrope": (theta, context, *_in(place, *LONGROPE), *longrope),
    }


READERS = (
    ConsumerProgram(
        "transformers 5",
        "modeling_rope_utils.py, 5.23.0",
        {
            **_keys(NEW, f"{NEW}.rope_theta", (f"{NEW}.factor",)),
            "proportional": _in(NEW, "rope_theta", "partial_rotary_factor", "factor"),
        },
    ),
    ConsumerProgram(
        "transformers 4",
        "modeling_rope_utils.py, 4.57.1",
        _keys(OLD, "rope_theta", (ORIGINAL, f"{OLD}.attention_factor")),
    ),
    ConsumerProgram(
        "transformers before 4.55",
        "modeling_rope_utils.py, 4.51.3",
        _keys(OLD, "rope_theta", (ORIGINAL, f"{OLD}.attention_factor")),
        unread=("truncate",),
    ),
    ConsumerProgram(
        "vLLM",
        "model_executor/layers/rotary_embedding/__init__.py, 07b12f1",
        _keys(NEW, f"{NEW}.rope_theta"),
        unread=("mscale", "mscale_all_dim", "attention_factor"),
        otherwise={
            "dynamic": "stretches every document as one of factor × max_position_embeddings tokens",
            "longrope": "uses the long factors for short documents too, unless max_model_len is "
            "the original context",
        },
    ),
    ConsumerProgram(
        "llama.cpp",
        "conversion/base.py and conversion/llama.py, 0274f0f",
        {**_keys(NEW, f"{NEW}.rope_theta"), "llama3": (*_in(NEW, *LLAMA3), ORIGINAL)},
        multiplied=("attention_factor",),
        unread=("truncate", "mscale", "mscale_all_dim"),
        otherwise={
            "dynamic": "reads plain RoPE",
            "longrope": "reads plain RoPE: it has LongRoPE for Phi-3 alone",
        },
    ),
)


def lookup(config: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key; None if there is none."""
    for part in key.split("."):
        config = config.get(part) or {} if isinstance(config, dict) else {}
    return config if config != {} else None


def check(config: dict[str, Any]) -> list[str]:
    """Return a line for every program that reads another model than was exported.

    Raises:
        ValueError: A key is not where a program looks for it.
    """
    if "rope_type" not in config[NEW]:  # settings by type of layer
        return [f"transformers before 5 and other programs may not read {NEW} by type of layer"]
    kind = config[NEW]["rope_type"]
    lines = []
    for reader in READERS:
        if kind in (reader.otherwise or {}):
            lines.append(f"{reader.name} {(reader.otherwise or {})[kind]}")
            continue
        if kind not in reader.keys:
            lines.append(f"{reader.name} ({reader.source}) has no rope_type {kind}")
            continue
        wanted = (key for key in reader.keys[kind] if lookup(config, key) is None)
        if wrong := next(wanted, None):
            raise ValueError(f"{reader.name} would misread {wrong}; this is a bug")
        if kind == "yarn":
            rope = config[NEW]
            lines += [f"{reader.name} does not read {k}" for k in reader.unread if k in rope]
            own = "with an attention factor of its own"
            lines += [f"{reader.name} multiplies {k} {own}" for k in reader.multiplied if k in rope]
    return lines
