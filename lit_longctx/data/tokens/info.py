"""What a data folder and a run record of the tokenizer that made their ids."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TokenizerInfo:
    """Identity of a tokenizer, and the ids that data made with it uses."""

    fingerprint: str
    """Hash of how it maps text to ids."""
    vocab_size: int
    bos: int
    """Id of the token that begins documents."""
    eos: int
    """Id of the token that ends documents."""
    add_bos: bool = True
    """Whether documents begin with BOS; until this was recorded, all did."""
    largest_id: int | None = None
    """Largest id in the data, less than `vocab_size` where [PAD] is unused; None: not recorded."""

    @property
    def prefix(self) -> list[int]:
        """Ids that documents begin with: BOS or nothing."""
        return [self.bos] if self.add_bos else []

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "TokenizerInfo":
        """Return what a manifest says; TypeError if it says too little."""
        names = TokenizerInfo.__dataclass_fields__
        return TokenizerInfo(**{name: content[name] for name in names if name in content})

    def as_json(self) -> dict[str, Any]:
        """Return what a manifest says: `add_bos` only where false, `largest_id` where known."""
        left_out = {"add_bos": True, "largest_id": None}
        pairs = asdict(self).items()
        return {n: v for n, v in pairs if n not in left_out or v is not left_out[n]}
