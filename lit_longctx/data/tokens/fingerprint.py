"""Hash of what decides a tokenizer's ids, and of nothing else."""

import hashlib
import json
from pathlib import Path
from typing import Any


def fingerprint(file: Path, bos: int, eos: int) -> str:
    """SHA-256 of what decides the ids of texts and of their borders.

    Of a tokenizer.json that is the normalizer, the pre-tokenizer, the model and the added tokens
    that text is matched with. Saving it anew changes nothing here, nor does another padding,
    truncation, decoder or post-processor, or one more special token: text is never matched with
    those. A tokenizer.model counts byte by byte.
    """
    content = file.read_bytes()
    if file.suffix == ".json":
        try:
            content = json.dumps(_decisive(json.loads(content)), sort_keys=True).encode()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no tokenizer.json: {error!r}") from None
    return hashlib.sha256(content + f"\n{bos}\n{eos}".encode()).hexdigest()


def _decisive(found: dict[str, Any]) -> dict[str, Any]:
    # newer versions of the library write settings that older ones left at this default
    model = {k: v for k, v in found["model"].items() if v not in (None, False, "")}
    if "merges" in model:  # "a b" until tokenizers 0.20, then ["a", "b"]
        model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    added = [token for token in found.get("added_tokens") or [] if not token["special"]]
    return {
        "normalizer": found.get("normalizer"),
        "pre_tokenizer": found.get("pre_tokenizer"),
        "model": model,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
    }
