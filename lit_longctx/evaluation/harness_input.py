"""What lm-eval's tasks are given: tokenizers that run no code, and words for data not there."""

from pathlib import Path

from lit_longctx.json_file import read_object


def check_no_code(folder: Path) -> None:
    """Refuse a folder whose tokenizer is code: RULER's tasks would run it.

    Raises:
        ValueError: config.json or tokenizer_config.json names a tokenizer of its own (auto_map).
    """
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        if file.is_file() and "AutoTokenizer" in str(read_object(file).get("auto_map")):
            raise ValueError(
                f"{file} names code for the tokenizer, which RULER's tasks would run; expected no "
                "auto_map; remove it if the tokenizer does not need it"
            )


def unfetched(why: str) -> str:
    """Say that a task's data is not there, and which of RULER's tasks fetch none."""
    return (
        f"harness: error: data of a task cannot be fetched ({why}); run it once with a network, or "
        "choose tasks that draw their own: niah_single_1, niah_multikey_2, niah_multikey_3, "
        "ruler_vt, ruler_cwe, ruler_fwe"
    )
