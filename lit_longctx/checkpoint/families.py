"""Families of models that Hugging Face knows by model_type: rows that say what differs from Llama.

Looked up in transformers 5.23.0, whose configuration_*.py and modeling_*.py the rows follow; what
a row cannot tell is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lit_longctx.checkpoint.rope_config import check_by_type, read_position, rope_keys
from lit_longctx.checkpoint.temperature_config import BETA
from lit_longctx.model import LlamaConfig
from lit_longctx.model.layers import LayerKind, Layers
from lit_longctx.position import NoPE, PositionScheme, RoPE
from lit_longctx.position.rotary import ORIGINAL
from lit_longctx.position.scheme import THETA

Config = dict[str, Any]
"""What config.json holds."""
FULL, SLIDING = "full_attention", "sliding_attention"
"""Hugging Face's layer_types."""
NOT_TOLD = (
    "o_proj_bias",
    "qk_norm",
    "norm_placement",
    "hidden_act",
    "scale_embeddings",
    "query_pre_attn_scalar",
)
"""Fields of LlamaConfig that the family decides, rather than config.json."""
PLAIN = {f.name: f.default for f in fields(LlamaConfig) if f.name in NOT_TOLD}


# ---- windows: which layers have one


def all_full(config: Config) -> list[str]:
    """Return layer types of a family that has no windows."""
    return [FULL] * config["num_hidden_layers"]


def all_sliding(config: Config) -> list[str]:
    """Return layer types of Mistral: all layers have the window, if there is one."""
    kind = FULL if config.get("sliding_window") is None else SLIDING
    return [kind] * config["num_hidden_layers"]


def upper_sliding(config: Config) -> list[str]:
    """Return layer types of Qwen: windows from layer max_window_layers on."""
    full = config["max_window_layers"] if config["use_sliding_window"] else None
    number = config["num_hidden_layers"]
    if config.get("sliding_window") is None or full is None:
        return [FULL] * number
    return [SLIDING if i >= full else FULL for i in range(number)]


def nope_sliding(config: Config) -> list[str]:
    """Return layer types of SmolLM3: windows in layers without positions, if there are any."""
    used = config["use_sliding_window"] and config.get("sliding_window") is not None
    return [SLIDING if used and not rope else FULL for rope in has_rope(config)]


def one_full_in(key: str, every: int) -> Callable[[Config], list[str]]:
    """Return what gives layer types where every n-th layer is full; config.json may tell n."""

    def types(config: Config) -> list[str]:
        each = config.get(key, every)
        return [
            FULL if (i + 1) % each == 0 else SLIDING for i in range(config["num_hidden_layers"])
        ]

    return types


def no_window_keys(types: list[str], window: int | None) -> Config:
    """Return the keys of a family without windows."""
    if window is not None:
        raise ValueError(f"has no attention windows; got one of {window}")
    return {}


def same_window_keys(types: list[str], window: int | None) -> Config:
    """Return the keys of a family whose layers are all alike."""
    if len(set(types)) > 1:
        raise ValueError("has the window in all layers or in none; got it in some")
    return {"sliding_window": window}


def qwen_window_keys(types: list[str], window: int | None) -> Config:
    """Return Qwen's keys: those of layer types, and for older programs where windows begin."""
    upper = types.index(SLIDING) if window is not None else len(types)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": upper,
        "layer_types": types,
    }


def typed_window_keys(types: list[str], window: int | None) -> Config:
    """Return the keys of a family that names the type of each layer."""
    return {"sliding_window": window, "layer_types": types}


# ---- positions: which scheme a layer has


def one_scheme(config: Config, types: list[str], theta: float) -> list[PositionScheme]:
    """Return the same scheme for all layers."""
    return [read_position(config, theta)] * len(types)


def some_nope(config: Config, types: list[str], theta: float) -> list[PositionScheme]:
    """Return one scheme, but none for the layers that no_rope_layers marks with a 0."""
    scheme = read_position(config, theta)
    return [scheme if rope else NoPE() for rope in has_rope(config)]


def has_rope(config: Config) -> list[bool]:
    """Return whether each layer of SmolLM3 has positions."""
    number, told = config["num_hidden_layers"], config.get("no_rope_layers")
    if told is None:
        return [(i + 1) % config["no_rope_layer_interval"] != 0 for i in range(number)]
    if len(told) < number:
        raise ValueError(f"no_rope_layers has {len(told)} entries for {number} layers")
    return [bool(each) for each in told[:number]]


def by_type(local: Callable[[Config], float]) -> Callable[..., list[PositionScheme]]:
    """Return what reads a scheme for each type of layer.

    Args:
        local: Returns the rotary base of sliding layers, where rope_parameters does not tell it.
    """

    def schemes(config: Config, types: list[str], theta: float) -> list[PositionScheme]:
        told = config.get("rope_parameters") or {}
        whole = {**config, "rope_parameters": told.get(FULL)}
        beside = ("rope_scaling", "rope_theta", ORIGINAL)
        alone = {key: value for key, value in config.items() if key not in beside}
        alone["rope_parameters"] = told.get(SLIDING)
        if told and not told.keys() & {FULL, SLIDING}:
            raise ValueError(f"rope_parameters has no {FULL}; expected settings by type of layer")
        base = theta if told else local(config)
        found = {FULL: read_position(whole, theta), SLIDING: read_position(alone, base)}
        for scheme in found.values():
            check_by_type(scheme)
        return [found[kind] for kind in types]

    return schemes


def olmo3_local(config: Config) -> float:
    """Return the base of OLMo 3's sliding layers in the old form of config.json."""
    if (theta := config.get("rope_theta") or 5e5) != 5e5:
        raise ValueError(
            f"rope_theta is {theta}, which transformers 5 ignores in sliding layers, but 4 heeds; "
            "give rope_parameters by type of layer"
        )
    return theta


def gemma3_local(config: Config) -> float:
    """Return the base of Gemma 3's sliding layers in the old form of config.json."""
    return config.get("rope_local_base_freq", 1e4)


def one_scheme_keys(layers: Layers, head_dim: int, context: int) -> Config:
    """Return the rope keys of layers that share a scheme."""
    return rope_keys(layers.position, head_dim, context)


def some_nope_keys(layers: Layers, head_dim: int, context: int) -> Config:
    """Return the rope keys of layers that share a scheme or have none."""
    schemes = [kind.position for kind in layers.by_layer]
    rotary = [scheme for scheme in schemes if not isinstance(scheme, NoPE)] or [RoPE()]
    found = rope_keys(Layers.of([LayerKind(each) for each in rotary]).position, head_dim, context)
    marks = [int(not isinstance(scheme, NoPE)) for scheme in schemes]
    return {**found, "no_rope_layers": marks}


def typed_keys(layers: Layers, head_dim: int, context: int) -> Config:
    """Return rope_parameters by type of layer, and for older programs those of full layers."""
    found = {}
    for kind in layers.kinds:
        check_by_type(kind.position)
    for name in (FULL, SLIDING):
        kinds = [kind for kind in layers.kinds if (kind.window is None) == (name == FULL)]
        found[name] = rope_keys(Layers.of(kinds or list(layers.kinds)).position, head_dim, context)
    contexts = {each["max_position_embeddings"] for each in found.values()}
    if len(contexts) > 1:
        raise ValueError("has one max_position_embeddings for all layers; their schemes need two")
    nested = {name: each["rope_parameters"] for name, each in found.items()}
    return {**found[FULL], "rope_parameters": nested}


def gemma3_keys(layers: Layers, head_dim: int, context: int) -> Config:
    """Return rope_parameters by type of layer, and Gemma 3's older key for sliding layers."""
    found = typed_keys(layers, head_dim, context)
    return {**found, "rope_local_base_freq": found["rope_parameters"][SLIDING]["rope_theta"]}


# ---- the table


@dataclass(frozen=True)
class Family:
    """A row: what the models of one model_type have in common, and how config.json tells the rest.

    The defaults are Llama's.
    """

    prefix: str
    """Of the names of transformers' classes; in lower case, of its module."""
    shape: Mapping[str, Any] = field(default_factory=dict)
    """Fields of LlamaConfig that all its models have, whatever config.json says."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a key means that config.json leaves out; of the others LlamaConfig's."""
    theta: float = THETA
    """Rotary base where config.json has none."""
    types: Callable[[Config], list[str]] = all_full
    """Type of each layer where config.json has no layer_types."""
    reads_types: bool = False
    """Whether layer_types in config.json is heeded."""
    window_keys: Callable[[list[str], int | None], Config] = no_window_keys
    """Types of layers and window → keys of config.json."""
    schemes: Callable[[Config, list[str], float], list[PositionScheme]] = one_scheme
    """config.json, types and base → scheme of each layer."""
    scheme_keys: Callable[[Layers, int, int], Config] = one_scheme_keys
    """Layers, head_dim and context → keys of config.json."""
    activation_key: str = "hidden_act"
    """Key of config.json for the MLP's activation."""
    neutral: Mapping[str, Any] = field(default_factory=dict)
    """Keys that would make another model of it, and the value with which they do not."""
    has_query_temperature: bool = False
    """Whether queries of all layers grow with their position, as its rope settings say."""
    norm_offset: float = 0.0
    """Is added to stored weights of norms: Gemma's start at 0 and scale by 1 + weight."""

    @property
    def architecture(self) -> str:
        """Class name of the whole model in transformers."""
        return f"{self.prefix}ForCausalLM"

    @property
    def fixed(self) -> dict[str, Any]:
        """Fields of LlamaConfig that config.json does not decide."""
        return {k: v for k, v in PLAIN.items() if k not in self.defaults} | dict(self.shape)


QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}
MINISTRAL_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    ORIGINAL: 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    BETA: 0.1,
}
OLMO = {"qk_norm": "width", "norm_placement": "after"}
OLMO_DEFAULTS = {"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279}
FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family(
        "Mistral",
        {"attention_bias": False},
        {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
        types=all_sliding,
        window_keys=same_window_keys,
    ),
    "ministral3": Family(
        "Ministral3",
        {"attention_bias": False},
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "rms_norm_eps": 1e-5,
            "rope_parameters": MINISTRAL_ROPE,
        },
        types=all_sliding,
        window_keys=same_window_keys,
        has_query_temperature=True,
    ),
    "qwen2": Family(
        "Qwen2",
        {"attention_bias": True, "o_proj_bias": False},
        QWEN_DEFAULTS,
        types=upper_sliding,
        reads_types=True,
        window_keys=qwen_window_keys,
    ),
    "qwen3": Family(
        "Qwen3",
        {"qk_norm": "head"},
        {**QWEN_DEFAULTS, "head_dim": 128},
        types=upper_sliding,
        reads_types=True,
        window_keys=qwen_window_keys,
    ),
    "smollm3": Family(
        "SmolLM3",
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": True,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
        },
        theta=2e6,
        types=nope_sliding,
        reads_types=True,
        window_keys=qwen_window_keys,
        schemes=some_nope,
        scheme_keys=some_nope_keys,
    ),
    "olmo2": Family("Olmo2", OLMO, OLMO_DEFAULTS),
    "olmo3": Family(
        "Olmo3",
        OLMO,
        {**OLMO_DEFAULTS, "sliding_window": 4096},
        theta=5e5,
        types=one_full_in("", 4),
        reads_types=True,
        window_keys=typed_window_keys,
        schemes=by_type(olmo3_local),
        scheme_keys=typed_keys,
    ),
    "gemma3_text": Family(
        "Gemma3",
        {
            "qk_norm": "head",
            "norm_placement": "both",
            "hidden_act": "gelu_pytorch_tanh",
            "scale_embeddings": True,
        },
        {
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        theta=1e6,
        types=one_full_in("sliding_window_pattern", 6),
        reads_types=True,
        window_keys=typed_window_keys,
        schemes=by_type(gemma3_local),
        scheme_keys=gemma3_keys,
        activation_key="hidden_activation",
        neutral={
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        norm_offset=1.0,
    ),
}
"""By model_type; the first that can tell a model is what an export makes of it."""
