"""Pickles of a distributed checkpoint, checked before torch reads them: they might run code."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from lit_longctx.json_file import error_text
from lit_longctx.manifest import check_inside

LOOP = "meta.pt"
"""File in which Lightning keeps what is no tensor: of loop, callbacks and data."""
METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = {
    *((METADATA, name) for name in ("Metadata", "StorageMeta", "MetadataIndex")),
    *((METADATA, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    *((METADATA, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
"""What torch writes into `.metadata`; none of it does more than hold values."""


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise ValueError(f"names {module}.{name}, which no checkpoint needs and might run code")


def _check_place(info: Any) -> None:
    """Refuse a value that torch would read from another folder, or unpack before it reads it."""
    check_inside("metadata that", info.relative_path)
    if info.transform_descriptors:
        raise ValueError(f"names {info.transform_descriptors} to unpack values by")


def check_pickles(folder: Path) -> None:
    """Refuse a distributed checkpoint whose pickles name more than torch's own metadata.

    Raises:
        ValueError: What `.metadata`, a pickled value (settings of the optimizer) or `meta.pt` names
            besides; a value that is in no file of the folder.
    """
    file = folder / ".metadata"
    try:
        metadata: Metadata = _Restricted(io.BytesIO(file.read_bytes())).load()
        entries, where = metadata.state_dict_metadata, metadata.storage_data or {}
        for info in where.values():
            _check_place(info)
        values = [name for name, e in entries.items() if isinstance(e, BytesStorageMetadata)]
        for name in values:
            info = where[MetadataIndex(name)]
            file = folder / info.relative_path
            with file.open("rb") as stored:
                stored.seek(info.offset)
                torch.load(io.BytesIO(stored.read(info.length)), weights_only=True)
        if (file := folder / LOOP).is_file():
            torch.load(file, weights_only=True)
    except ValueError as error:
        raise ValueError(f"{file} {error}; do not use a checkpoint you do not trust") from None
    except (
        pickle.UnpicklingError,
        AttributeError,
        KeyError,
        EOFError,
        OSError,
        RuntimeError,  # of torch, for a torn archive
    ) as error:
        line = error_text(error)[:200]
        raise ValueError(f"{file} is torn, or holds more than values: {line}") from None


class CheckedReader(FileSystemReader):
    """Reads a distributed checkpoint whose pickles have been checked."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Check, then read."""
        check_pickles(Path(self.path))
        return super().read_metadata(*args, **kwargs)
