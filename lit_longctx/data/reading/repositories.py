"""Source repositories → documents."""

from collections.abc import Iterator, Set
from pathlib import Path

from lit_longctx.data.reading.faults import Faults

SCRIPT_SUFFIXES = {".jl", ".js", ".lua", ".php", ".py", ".rb", ".sh", ".sql", ".ts"}
COMPILED_SUFFIXES = {
    ".c",
    ".cc",
    ".cpp",
    ".cs",
    ".go",
    ".h",
    ".hpp",
    ".java",
    ".kt",
    ".rs",
    ".scala",
}
CODE_SUFFIXES = SCRIPT_SUFFIXES | COMPILED_SUFFIXES
VENDORED = {"__pycache__", "dist-packages", "node_modules", "site-packages", "vendor"}
"""Folders of what a repository did not write itself."""
STDLIB_LEAVES_OUT = VENDORED | {"test", "tests", "idlelib"}


def repositories(
    root: Path,
    faults: Faults,
    leave_out: Set[str] = VENDORED,
    suffixes: Set[str] = CODE_SUFFIXES,
    largest: int = 2**28,
) -> Iterator[tuple[Path, str]]:
    """Yield one text per repository (a folder directly below `root`) and one per single file.

    A repository's files stand in order of their paths, compared folder by folder, each under a line
    with its path: whole repositories as in ProLong (Gao et al. 2024, arXiv:2410.02660), and not in
    order of imports. Left out without a word: hidden files and folders, links, vendored folders,
    other suffixes. Left out and counted: files that are no text or of more than `largest` bytes,
    and repositories of more.

    Returns:
        Pairs of the repository's path and its text.
    """
    for entry in _entries(root, leave_out, faults):
        text = _joined(entry, root, faults, leave_out, suffixes, largest)
        if text:
            yield entry, text


def _joined(
    entry: Path, root: Path, faults: Faults, leave_out: Set[str], suffixes: Set[str], largest: int
) -> str:
    text, size = "", 0
    for file in _sources(entry, leave_out, suffixes, faults):
        if source := _source(file, largest, faults):
            header = f"# {file.relative_to(root).as_posix()}\n"
            size += len(header.encode(errors="surrogatepass")) + file.stat().st_size
            if size > largest:
                faults.add("too large", str(entry))
                return ""
            text += f"\n{header}" if text else header
            text += source
    return text


def _sources(
    entry: Path, leave_out: Set[str], suffixes: Set[str], faults: Faults
) -> Iterator[Path]:
    if not entry.is_dir():
        if entry.suffix in suffixes and entry.is_file():
            yield entry
        return
    for below in _entries(entry, leave_out, faults):
        yield from _sources(below, leave_out, suffixes, faults)


def _entries(folder: Path, leave_out: Set[str], faults: Faults) -> list[Path]:
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        faults.add(f"unreadable: {error.strerror}", str(folder))
        return []
    hidden = (path.name.startswith(".") or path.name in leave_out for path in found)
    return [p for p, out in zip(found, hidden, strict=True) if not out and not p.is_symlink()]


def _source(file: Path, largest: int, faults: Faults) -> str:
    try:
        if file.stat().st_size > largest:
            faults.add("too large", str(file))
            return ""
        text = file.read_text(encoding="utf-8-sig")
        if "\0" not in text:
            return text
        faults.add("NUL in text", str(file))
    except UnicodeDecodeError:
        faults.add("bad UTF-8", str(file))
    except OSError as error:
        faults.add(f"unreadable: {error.strerror}", str(file))
    return ""
