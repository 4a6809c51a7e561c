"""Token windows by number from a prepared folder; all that touches litdata's reading side."""

from pathlib import Path
from typing import Any

import numpy as np
from litdata import StreamingDataset, TokensLoader
from litdata.utilities.env import _DistributedEnv

from lit_longctx import manifest


class Windows:
    """Windows of `length` + 1 tokens at stride `length` over one split of a prepared folder.

    Each file's hash is checked when it is first read, so that an altered one stops the run instead
    of training it. Costs about 15 µs per block.
    """

    def __init__(self, folder: str | Path, split: str, length: int) -> None:
        self.folder, self.split, self.length = Path(folder), split, length
        if not self.folder.is_dir():
            raise ValueError(
                f"data folder {folder} does not exist; make it with lit_longctx prepare"
            )
        self.manifest: dict[str, Any] = manifest.read(self.folder)
        if split not in self.manifest.get("splits", {}):
            raise ValueError(f"{folder} holds no split {split!r}; make it with lit_longctx prepare")
        self.block: int = self.manifest["block"]
        chunk = self.manifest["chunk_tokens"]
        if length < 1 or length % self.block:
            raise ValueError(f"window {length} is no multiple of the block of {self.block} tokens")
        if length > chunk:
            raise ValueError(
                f"window {length} exceeds chunk of {chunk} tokens; "
                f"prepare with --chunk_tokens {length} or more"
            )
        self.tokens: int = self.manifest["splits"][split]["tokens"]
        self.blocks_per_chunk = chunk // self.block
        self.checked: set[int] = set()
        self._stream: StreamingDataset | None = None

    def __len__(self) -> int:
        """Whole windows in the split; the last needs one token beyond it."""
        return max(0, (self.tokens - 1) // self.length)

    @property
    def dropped(self) -> int:
        """Stride tokens at the end that fill no window: tokens = windows × length + dropped."""
        return self.tokens - len(self) * self.length

    def __getitem__(self, index: int) -> np.ndarray:
        """Return tokens [index × length, (index + 1) × length], both ends included."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        first = index * self.length // self.block
        blocks = [self._block(first + i) for i in range(self.length // self.block)]
        following = self._block(first + self.length // self.block)[:1]
        return np.concatenate([*blocks, following]).astype(np.int64)

    def _block(self, number: int) -> np.ndarray:
        chunk = number // self.blocks_per_chunk
        if chunk not in self.checked:
            self._check(f"chunk-0-{chunk}.bin")
            self.checked.add(chunk)
        return np.asarray(self._open()[number])

    def _check(self, file: str) -> None:
        name = f"{self.split}/{file}"
        manifest.check_file(self.folder, name, self.manifest["files"][name])

    def _open(self) -> StreamingDataset:
        if self._stream is None:
            self._check("index.json")
            loader = TokensLoader(block_size=self.block)
            self._stream = StreamingDataset(
                str(self.folder / self.split), item_loader=loader, shuffle=False
            )
            # litdata would divide the blocks among ranks by itself; here every rank sees all
            self._stream.distributed_env = _DistributedEnv(1, 0, 1)
        return self._stream

    def __getstate__(self) -> dict[str, Any]:
        """Leave litdata's open files behind when a loader worker copies this."""
        return {**self.__dict__, "_stream": None}
