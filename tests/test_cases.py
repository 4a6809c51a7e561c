"""Users' files and habits that once went wrong; `make cases` prints one table of all of them.

A case is a folder: README says what is expected and what was got before, check.py tries it.
"""

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "cases"
SLOW = {"export_longrope_transformers4", "harness_more_to_generate_than_context"}
"""They need other packages."""
LATER: dict[str, str] = {}


def marked(case: str) -> pytest.ParameterSet:
    marks = [pytest.mark.slow] if case in SLOW else []
    if case in LATER:
        marks.append(pytest.mark.xfail(reason=LATER[case], strict=True))
    return pytest.param(case, marks=marks)


@pytest.mark.parametrize("case", [marked(p.parent.name) for p in sorted(FOLDER.glob("*/README"))])
def test_case(case: str, tmp_path: Path):
    check = runpy.run_path(str(FOLDER / case / "check.py"))["check"]
    check(FOLDER / case, tmp_path / "work")


class Table:
    """Collects a line for each case: what README says of before, and what came of it now."""

    def __init__(self) -> None:
        self.lines = [row("case", "before", "now"), row("-" * 40, "-" * 46, "-" * 16)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        case = report.nodeid.rpartition("[")[2].removesuffix("]")
        before = (FOLDER / case / "README").read_text().splitlines()[0].removeprefix("before: ")
        now = {"passed": "passes", "failed": "FAILS", "skipped": "skipped"}[report.outcome]
        now = "fails as expected" if hasattr(report, "wasxfail") else now
        self.lines.append(row(case, before, now))


def row(*cells: str) -> str:
    return "{:40}  {:46}  {}".format(*cells)


if __name__ == "__main__":
    table = Table()
    quiet = ["--tb=short", "--show-capture=no", "--disable-warnings"]
    code = pytest.main([__file__, "-m", "", *quiet, *sys.argv[1:]], plugins=[table])
    print("\n".join(["", *table.lines]))
    sys.exit(code)
