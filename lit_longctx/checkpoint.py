"""Model folders: Hugging Face folder ↔ Llama, our own run folders, Meta's checkpoints.

Weights are read slice by slice from safetensors or from a distributed checkpoint into parameters
that may be sharded already; nothing here unpickles a file that did not come from one of our runs.
"""

import importlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_longctx import hugging_face, manifest, meta
from lit_longctx import position as schemes
from lit_longctx.attention import AttnImplementation
from lit_longctx.model import Llama, LlamaConfig, initial_weight
from lit_longctx.position import PositionScheme

MODEL = "model.json"
"""File in a run's checkpoint that describes the model: config, position scheme, trained context."""
CHAT_TEMPLATE = "chat_template.jinja"
"""File beside a tokenizer that says how its model wants to be talked to."""
GENERATION = "generation_config.json"
"""File beside a model, or its tokenizer, that says which tokens end a text."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    CHAT_TEMPLATE,
)
SHARD_BYTES = 5 * 2**30
"""Bytes of weights per exported file, as Hugging Face cuts them."""

SCHEME = ".self_attn.position."
"""Part of the names of weights that belong to a position scheme."""


# ---- what a folder says of its model


def resolve(folder: str | Path) -> Path:
    """Return the folder that holds the weights: itself, or a run's newest whole checkpoint."""
    path = Path(folder)
    if any((path / name).is_file() for name in ("config.json", MODEL, meta.PARAMS)):
        return path
    if (path / "checkpoints").is_dir():
        return newest_whole(path / "checkpoints")
    if not path.exists():
        raise ValueError(f"checkpoint {path} does not exist; expected a Hugging Face or run folder")
    raise ValueError(
        f"{path} holds neither config.json nor checkpoints; expected a Hugging Face or run folder"
    )


def newest_whole(folder: Path) -> Path:
    """Return the newest checkpoint of a run that verifies, naming on the way those that do not."""
    steps = sorted((p for p in folder.glob("step-*") if ".tmp-" not in p.name), reverse=True)
    for step in steps:
        try:
            manifest.verify(step)
            return step
        except ValueError as error:
            print(f"skipping {step.name}: {error}")
    raise ValueError(f"{folder} holds no whole checkpoint; start the run anew")


def read_model(folder: str | Path) -> tuple[LlamaConfig, PositionScheme]:
    """Return the config and position scheme of a Hugging Face folder or of one of our runs."""
    path = resolve(folder)
    if (path / MODEL).is_file():
        description = json.loads((path / MODEL).read_text())
        return LlamaConfig(**description["config"]), _scheme(description["position"])
    if (path / "config.json").is_file():
        return hugging_face.read_config(path)
    return meta.read_params(path)


def describe(llama: Llama, context: int | None) -> dict[str, Any]:
    """Return what MODEL holds: enough to rebuild the model without the run's YAML."""
    return {
        "config": asdict(llama.config),
        "position": describe_position(llama.position),
        "context": context,
        "torch": torch.__version__,
    }


def describe_position(position: PositionScheme) -> dict[str, Any]:
    """Return a scheme as class_path and init_args, the form configs use."""
    kind = type(position)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": vars(position)}


def _scheme(description: dict[str, Any]) -> PositionScheme:
    module, name = description["class_path"].rsplit(".", 1)
    if module.startswith(schemes.__name__):  # the file of one of ours may have changed
        module = schemes.__name__
    return getattr(importlib.import_module(module), name)(**description["init_args"])


def trained_context(folder: str | Path) -> int:
    """Tokens per sequence that a checkpoint was trained on."""
    path = resolve(folder)
    if (path / MODEL).is_file():
        context = json.loads((path / MODEL).read_text())["context"]
        if context:
            return context
    return read_model(path)[0].max_position_embeddings


def tokenizer_folder(folder: str | Path) -> Path | None:
    """Folder that holds a checkpoint's tokenizer, if any: itself, or its run's `tokenizer`."""
    path = resolve(folder)
    candidates = (path, path / "tokenizer", path.parent.parent / "tokenizer")
    files = ("tokenizer.json", "tokenizer.model")
    return next((c for c in candidates if any((c / f).is_file() for f in files)), None)


# ---- weights in


def load_pretrained(
    folder: str | Path,
    position: PositionScheme | None = None,
    attn_implementation: AttnImplementation = "sdpa",
) -> Llama:
    """Load a Hugging Face Llama folder or one of our runs, in float32.

    Args:
        folder: config.json with one or several safetensors files, a run folder, or one of its
            checkpoints.
        position: The scheme to use; default: the one the folder describes.
        attn_implementation: Attention back end.

    Raises:
        ValueError: what is missing, torn, of another shape or beyond what this model can
            represent, by name.
    """
    path = resolve(folder)
    config, own = read_model(path)
    with torch.device("meta"):
        llama = Llama(config, position or own, attn_implementation)
    llama.to_empty(device="cpu")
    fill(llama, path)
    return llama


def fill(llama: Llama, folder: Path | None, seed: int = 0) -> list[str]:
    """Fill parameters, sharded or not, from a folder; return the names that it did not hold.

    Only weights of the position scheme may be missing (a RoPE checkpoint has none for
    Transformer-XL): those, and everything when `folder` is None, start anew.
    """
    parameters: dict[str, Tensor] = {plain(name): p for name, p in llama.named_parameters()}
    if folder is None:
        missing = list(parameters)
    elif (folder / MODEL).is_file():
        missing = _fill_from_run(parameters, folder, llama.config)
    elif (folder / "config.json").is_file():
        missing = _fill_from_safetensors(parameters, folder, llama.config)
    else:
        missing = _fill_from_meta(parameters, folder, llama.config)
    for name in missing:
        shape = parameters[name].shape
        if SCHEME in name:
            weight = llama.position.initial_weight(name.rsplit(".", 1)[1], shape)
        else:
            weight = initial_weight(name, shape, llama.config.num_hidden_layers, seed)
        _copy(parameters[name], weight)
    return missing


def plain(name: str) -> str:
    """Parameter name without what activation checkpointing and compilation put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


@torch.no_grad()
def _copy(parameter: Tensor, stored: Any) -> None:
    """Copy this rank's shard of `parameter` out of a tensor or a lazily read slice of a file."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(stored[:])
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    part = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
    parameter.to_local().copy_(stored[part])


def _compare(
    parameters: dict[str, Tensor], stored: dict[str, list[int]], folder: Path, config: LlamaConfig
) -> list[str]:
    """Return the scheme's weights that `folder` lacks; ValueError names any other difference."""
    missing = [name for name in parameters if name not in stored]
    if foreign := [name for name in missing if SCHEME not in name]:
        raise ValueError(f"{folder} lacks {foreign[0]} ({len(foreign)} weights missing)")
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name in stored:
        spare = name in tied or SCHEME in name or name.endswith("rotary_emb.inv_freq")
        if name not in parameters and not spare:
            raise ValueError(f"{folder} holds {name}, which this model has no place for")
    for name, parameter in parameters.items():
        if name in stored and stored[name] != list(parameter.shape):
            expected = list(parameter.shape)
            raise ValueError(f"{folder}: {name} is {stored[name]}, expected {expected}")
    return missing


def _fill_from_safetensors(
    parameters: dict[str, Tensor], folder: Path, config: LlamaConfig
) -> list[str]:
    """Read of every tensor only the bytes that this rank holds."""
    handles = [_open(file) for file in _safetensors_files(folder)]
    stored = {name: handle.get_slice(name) for handle in handles for name in handle.keys()}  # noqa: SIM118
    shapes = {name: list(part.get_shape()) for name, part in stored.items()}
    missing = _compare(parameters, shapes, folder, config)
    for name in parameters.keys() - set(missing):
        _copy(parameters[name], stored[name])
    return missing


def _fill_from_meta(parameters: dict[str, Tensor], folder: Path, config: LlamaConfig) -> list[str]:
    """Join and permute Meta's parts; every rank reads all of them, memory-mapped."""
    stored = meta.read_weights(folder, config)
    shapes = {name: list(weight.shape) for name, weight in stored.items()}
    missing = _compare(parameters, shapes, folder, config)
    for name in parameters.keys() - set(missing):
        _copy(parameters[name], stored[name])
    return missing


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            return [single]
        raise ValueError(f"{folder} holds no model.safetensors; convert it to safetensors first")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{folder / name}, named by {index.name}, is missing")
    return [folder / name for name in names]


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is torn or no safetensors file: {error}") from None


def _fill_from_run(parameters: dict[str, Tensor], folder: Path, config: LlamaConfig) -> list[str]:
    """Load a run's distributed checkpoint in place, resharded as needed."""
    import torch.distributed.checkpoint as dcp

    manifest.verify(folder)
    storage = dcp.FileSystemReader(folder)
    metadata = storage.read_metadata().state_dict_metadata
    prefix = "state_dict.llama."
    shapes = {
        name.removeprefix(prefix): list(getattr(entry, "size", []))
        for name, entry in metadata.items()
        if name.startswith(prefix)
    }
    missing = _compare(parameters, shapes, folder, config)
    held = {f"llama.{name}": p.detach() for name, p in parameters.items() if name not in missing}
    dcp.load(
        {"state_dict": held}, storage_reader=storage, no_dist=not torch.distributed.is_initialized()
    )
    return missing


# ---- weights out


def export_pretrained(
    llama: Llama,
    folder: str | Path,
    tokenizer: Any = None,
    context: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a Hugging Face folder that transformers 4 and 5 read as the same model.

    Args:
        llama: The model; sharded parameters are gathered one at a time.
        folder: Where to; must not exist. Appears whole or not at all.
        tokenizer: A folder to copy tokenizer files from, or an object with `.save(folder)`.
        context: The new max_position_embeddings; default: the config's.
        dtype: Of the stored weights.

    Raises:
        ValueError: for a position scheme that Hugging Face cannot represent.
    """
    config = hugging_face.config_json(llama, context, dtype)
    with manifest.whole_folder(Path(folder)) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _save_weights(llama, temporary, dtype)
        _save_tokenizer(tokenizer, temporary)
        (temporary / GENERATION).write_text(json.dumps(_ends(config, tokenizer), indent=2) + "\n")
        hugging_face.compare_with_transformers(temporary, llama)
    return Path(folder)


def _ends(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return where texts begin and end: a chat's turns end as the tokenizer's folder says."""
    ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    folder = tokenizer if isinstance(tokenizer, str | Path) else None
    if folder is not None and (file := Path(folder) / GENERATION).is_file():
        told = json.loads(file.read_text()).get("eos_token_id")
        both = {*(told if isinstance(told, list) else [told]), config["eos_token_id"]} - {None}
        ends["eos_token_id"] = sorted(both) if len(both) > 1 else next(iter(both), None)
    return ends


def _save_weights(llama: Llama, folder: Path, dtype: torch.dtype) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for long_name, parameter in llama.named_parameters():
        weight = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        weight = weight.detach().to("cpu", dtype).contiguous()
        if filled and filled + weight.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][plain(long_name)] = weight
        filled += weight.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(weight.nbytes for shard in shards for weight in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is None:
        return
    if hasattr(tokenizer, "save"):
        tokenizer.save(folder)
        return
    found = [
        Path(tokenizer) / name for name in TOKENIZER_FILES if (Path(tokenizer) / name).is_file()
    ]
    if not found:
        raise ValueError(f"{tokenizer} holds none of {', '.join(TOKENIZER_FILES)}")
    for file in found:
        shutil.copy(file, folder)


def export(
    checkpoint: str,
    output: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Path:
    """Write a run's newest checkpoint as a Hugging Face folder.

    Args:
        checkpoint: Run folder, or one of its checkpoints.
        output: Folder to make; must not exist.
        dtype: Of the stored weights.
    """
    path = resolve(checkpoint)
    llama = load_pretrained(path)
    tokenizer, context = tokenizer_folder(path), trained_context(path)
    export_pretrained(llama, output, tokenizer, context, getattr(torch, dtype))
    print(f"{llama.position}, context {context:,}, tokenizer from {tokenizer}")
    print(f"wrote {output}")
    return Path(output)
