"""The registry of claims: what its commands name must be there, and run in this suite."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAPERS = yaml.safe_load((ROOT / "docs/reproductions.yaml").read_text())
CLAIMS = [claim for paper in PAPERS for claim in paper["claims"]]


def test_every_claim_says_what_the_table_needs():
    for claim in CLAIMS:
        expected = {"claim", "where", "theirs", "ours", "status", "command"}
        assert set(claim) - {"why"} == expected, claim["claim"]
        assert claim["status"] in ("reproduced", "ordering", "formula", "not_shown", "not_run")
        assert ("why" in claim) == claim["status"].startswith("not_"), claim["claim"]
        assert bool(claim["ours"]) or claim["status"] == "not_run", claim["claim"]


@pytest.mark.parametrize("command", sorted({claim["command"] for claim in CLAIMS}))
def test_what_a_command_names_is_there(command):
    """Tests and notebooks run in this suite, every config in test_configs.py."""
    kind, *words = command.split()
    if kind == "pytest":
        path, _, name = words[0].partition("::")
        functions = ast.parse((ROOT / path).read_text()).body
        tests = {f.name for f in functions if isinstance(f, ast.FunctionDef)}
        assert not name or name in tests
    elif kind == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif kind == "lit_longctx":
        assert words[1] == "--config"
        assert (ROOT / words[2]).is_file()
    else:
        assert (ROOT / (words[0] if kind == "python" else kind)).is_file()
