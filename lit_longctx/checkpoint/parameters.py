"""A model's parameters: filled from safetensors, distributed or Meta's files, and written.

Weights are read slice by slice into parameters that may be sharded already.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_longctx import manifest
from lit_longctx.checkpoint import meta
from lit_longctx.checkpoint.families import FAMILIES
from lit_longctx.json_file import read_object
from lit_longctx.model import Llama, LlamaConfig, initial_weight

SHARD_BYTES = 5 * 2**30
"""Bytes of weights per exported file, as Hugging Face cuts them."""
SCHEME = ".self_attn.position."
"""Part of the names of weights that belong to a position scheme."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")
"""Dtypes of weights, as safetensors and torch name them."""
DISTRIBUTED = ".metadata"
"""File that makes a folder a distributed checkpoint."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a distributed checkpoint, as runs write them."""
    return (folder / DISTRIBUTED).is_file()


def fill(llama: Llama, folder: Path | None, seed: int = 0) -> list[str]:
    """Fill parameters, sharded or not, from a folder; return the names that it did not hold.

    What a folder's manifest says of it is checked before, by whoever opened it.

    Only weights of the position scheme may be missing (a RoPE checkpoint has none for
    Transformer-XL): those, and everything when `folder` is None, start anew.
    """
    parameters: dict[str, Tensor] = {plain(name): p for name, p in llama.named_parameters()}
    if folder is None:
        missing = list(parameters)
    elif is_run(folder):
        missing = _fill_from_run(parameters, folder, llama.config)
    elif (folder / "config.json").is_file():
        missing = _fill_from_safetensors(parameters, folder, llama.config)
    else:
        missing = _fill_from_meta(parameters, folder, llama.config)
    if folder is not None:
        check_finite({name: parameters[name] for name in parameters.keys() - set(missing)}, folder)
    for name in missing:
        shape = parameters[name].shape
        if SCHEME in name:
            layer = int(name.split(".")[2])
            scheme = llama.layers.position_of(layer)
            weight = scheme.initial_weight(name.rsplit(".", 1)[1], shape)
        else:
            weight = initial_weight(name, shape, llama.config.num_hidden_layers, seed)
        _copy(parameters[name], weight)
    return missing


@torch.no_grad()
def check_finite(tensors: dict[str, Tensor], folder: Path) -> None:
    """Refuse weights or moments that are no finite numbers, on all processes if on one.

    Reads them once more: about 10 GB/s.
    """
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    among = torch.distributed.is_available() and torch.distributed.is_initialized()
    if among and torch.distributed.get_world_size() > 1:
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, broken)
        broken = [name for names in gathered for name in names]
    if broken:
        dtype = str(tensors[broken[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"{folder}: {min(broken)} ({len(set(broken))} weights) holds NaN, infinity or numbers "
            f"beyond {dtype}; take an earlier checkpoint, or a dtype of more range"
        )


def _is_finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not local.numel():
        return True
    low, high = local.aminmax()  # NaN comes through
    return bool(low.isfinite() & high.isfinite())


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
    tied = {HEAD} if config.tie_word_embeddings else set()
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
    stored = _slices(folder)
    shapes = {name: list(part.get_shape()) for name, part in stored.items()}
    missing = _compare(parameters, shapes, folder, config)
    _check_dtypes(
        {name: stored[name].get_dtype() for name in parameters.keys() - set(missing)}, folder
    )
    if (
        config.tie_word_embeddings
        and HEAD in stored
        and not _equal(stored[HEAD], stored[EMBEDDING])
    ):
        raise ValueError(
            f"{folder}/config.json: tie_word_embeddings is true, but {HEAD} is stored with other "
            f"values than {EMBEDDING}; set it to false to use {HEAD}, or remove {HEAD}"
        )
    offset = FAMILIES[config.model_type].norm_offset
    for name in parameters.keys() - set(missing):
        _copy(parameters[name], stored[name])
        if offset and is_norm(name):
            with torch.no_grad():
                parameters[name].add_(offset)
    return missing


def is_norm(name: str) -> bool:
    """Whether a parameter is the weight of a norm."""
    return name.endswith("norm.weight")


def _fill_from_meta(parameters: dict[str, Tensor], folder: Path, config: LlamaConfig) -> list[str]:
    """Join and permute Meta's parts; every rank reads all of them, memory-mapped."""
    stored = meta.read_weights(folder, config)
    shapes = {name: list(weight.shape) for name, weight in stored.items()}
    missing = _compare(parameters, shapes, folder, config)
    _check_dtypes(
        {name: str(stored[name].dtype) for name in parameters.keys() - set(missing)}, folder
    )
    for name in parameters.keys() - set(missing):
        _copy(parameters[name], stored[name])
    return missing


def _check_dtypes(dtypes: dict[str, str], folder: Path) -> None:
    """Refuse weights stored as other than floating-point numbers."""
    for name, dtype in dtypes.items():
        if dtype.removeprefix("torch.") not in FLOATS:
            raise ValueError(
                f"{folder}: {name} is of dtype {dtype}, expected one of {', '.join(FLOATS[:4])}; a "
                "quantized model (see quantization_config) must be dequantized first"
            )


def _slices(folder: Path) -> dict[str, Any]:
    """Return every stored tensor, unread; ValueError where two files hold one with other values."""
    stored: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    for file in _safetensors_files(folder):
        handle = _open(file)
        for name in handle.keys():  # noqa: SIM118
            part = handle.get_slice(name)
            if name in stored and not _equal(stored[name], part):
                raise ValueError(
                    f"{folder}: {origin[name].name} and {file.name} hold {name} with other values; "
                    "remove the file that is not the model's"
                )
            stored[name], origin[name] = part, file
    return stored


def _equal(one: Any, other: Any, rows: int = 4096) -> bool:
    """Whether two stored tensors are the same, read a few rows at a time."""
    shape = one.get_shape()
    if shape != other.get_shape() or one.get_dtype() != other.get_dtype():
        return False
    starts = range(0, shape[0] if shape else 1, rows)
    return all(torch.equal(one[i : i + rows], other[i : i + rows]) for i in starts)


def _safetensors_files(folder: Path) -> list[Path]:
    """Files of weights: the index's, and a single file beside it; ValueError without any."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            return [single]
        if shards := sorted(folder.glob("*.safetensors")):
            raise ValueError(
                f"{folder} holds {shards[0].name} but no {index.name}, which says what the files "
                "hold; copy it too"
            )
        raise ValueError(f"{folder} holds no model.safetensors; convert it to safetensors first")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map that names files by weight; copy it again")
    for name in weight_map.values():
        manifest.check_inside(index, name)
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}, named by {index.name}, is missing")
    beside = [single] if single.is_file() and single.name not in names else []
    return [*(folder / name for name in names), *beside]


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is torn or no safetensors file: {error}") from None


def _fill_from_run(parameters: dict[str, Tensor], folder: Path, config: LlamaConfig) -> list[str]:
    """Load a run's distributed checkpoint in place, resharded as needed."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from lit_longctx.checkpoint.unpickling import CheckedReader

    storage = CheckedReader(folder)
    metadata = storage.read_metadata().state_dict_metadata
    prefix = "state_dict.llama."
    shapes = {
        name.removeprefix(prefix): list(getattr(entry, "size", []))
        for name, entry in metadata.items()
        if name.startswith(prefix)
    }
    missing = _compare(parameters, shapes, folder, config)
    stored = {name: metadata[f"{prefix}{name}"] for name in parameters.keys() - set(missing)}
    dtypes = {
        name: str(entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    _check_dtypes(dtypes, folder)
    held = {f"llama.{name}": p.detach() for name, p in parameters.items() if name not in missing}
    dcp.load(
        {"state_dict": held}, storage_reader=storage, no_dist=not torch.distributed.is_initialized()
    )
    return missing


def save(llama: Llama, folder: Path, dtype: torch.dtype, norm_offset: float = 0.0) -> None:
    """Write safetensors, with an index where they are several files.

    Args:
        llama: The model.
        folder: Where to.
        dtype: Of the stored weights.
        norm_offset: Is subtracted from the weights of norms; see `Family`.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for long_name, parameter in llama.named_parameters():
        weight = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        weight = weight.detach().cpu()
        if norm_offset and is_norm(plain(long_name)):
            weight = weight - norm_offset
        weight = _as_dtype(plain(long_name), weight, dtype)
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


def _as_dtype(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight as it is stored; ValueError where that is no finite number."""
    if not _is_finite(weight):
        raise ValueError(f"{name} holds NaN or infinity; export an earlier checkpoint")
    stored = weight.to(dtype).contiguous()
    if not _is_finite(stored):
        raise ValueError(
            f"{name} reaches {float(weight.abs().max()):.4g}, beyond the "
            f"{torch.finfo(dtype).max:.4g} of {str(dtype).removeprefix('torch.')}; export with "
            "--dtype bfloat16 or float32"
        )
    return stored
