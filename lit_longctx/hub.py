"""Names on the Hugging Face Hub, `org/name` or `org/name@revision` → folders on this disk.

huggingface_hub fetches and caches; HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are its own.
What is in its cache is found without a network.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    *TOKENIZER_FILES,
)
LEFT = ("*/*", "consolidated*")
"""Weights once more, in other forms."""
SECONDS = 20.0
"""Longest wait for the next answer of the Hub; it is asked again a few times."""
NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", re.ASCII)


def is_name(name: str) -> bool:
    """Whether a name may be one on the Hub: no path that exists, and in no folder that does."""
    return bool(NAME.fullmatch(name)) and not (Path(name).exists() or Path(name).parent.is_dir())


def folder(name: str, files: Sequence[str]) -> Path:
    """Return the folder in the cache that holds the files of a repository, fetched if need be.

    Args:
        name: `org/name`, perhaps with a branch, tag or commit: `org/name@revision`.
        files: Patterns of the files.

    Raises:
        ValueError: It is not there, not allowed, or neither reachable nor in the cache.
    """
    from huggingface_hub import snapshot_download

    limit_waiting()
    repository, _, revision = name.partition("@")
    try:
        found = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(files),
            ignore_patterns=list(LEFT),
        )
    except Exception as error:  # of the network, of the Hub, of the disk
        raise ValueError(
            f"{name} is no folder here, and not to be had from the Hub: {_why(error)}"
        ) from error
    return Path(found)


def limit_waiting() -> None:
    """Let requests to the Hub fail when no answer comes; without it some wait for ever."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks
    if _limit not in hooks["request"]:
        get_session().event_hooks = {**hooks, "request": [*hooks["request"], _limit]}


def _limit(request: Any) -> None:
    """Give a request its time limits; the library sets some to None, which is for ever."""
    told = request.extensions.get("timeout", {})
    limits = {name: min(seconds or SECONDS, SECONDS) for name, seconds in told.items()}
    request.extensions = {**request.extensions, "timeout": limits}


def _why(error: Exception) -> str:
    """Say in one line what is wrong and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access is restricted; ask for it on its page, then set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private; check the name, or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision; check what stands behind the @"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "it cannot be reached, and the cache does not hold it whole; check the connection"
    return " ".join(f"{type(error).__name__}: {error}".split())
