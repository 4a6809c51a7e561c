"""Shapes in annotations are checked in tests only: jaxtyping's import hook with beartype."""

import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; tests are small

import figures
import pytest

ROOT = Path(__file__).parents[1]
WITH_SHAPES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "lit_longctx").rglob("*.py")
    if "from jaxtyping" in path.read_text()
]


def pytest_configure(config: pytest.Config) -> None:
    """Import what takes seconds, but not in the process that only hands out tests to workers."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    # what the hook sees imported is compiled anew, so before it
    import lightning.pytorch  # noqa: F401
    import litdata  # noqa: F401
    import torch._dynamo  # noqa: F401
    from jaxtyping import install_import_hook

    install_import_hook(WITH_SHAPES, "typechecker.check")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--differences", action="store_true", help="print distances to references")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow all but a few of the cases of tests that have `fast_cases`."""
    cases = defaultdict(list)
    for item in items:
        if marker := item.get_closest_marker("fast_cases"):
            cases[item.nodeid.partition("[")[0], marker.args[0]].append(item)
    for (_, number), found in cases.items():
        fast = {i * len(found) // number for i in range(number)}
        for i, item in enumerate(found):
            if i not in fast:
                item.add_marker(pytest.mark.slow)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remove what the workers shared (training.runs.workshop), once the last has ended."""
    if controller := session.config.pluginmanager.getplugin("dsession"):
        folder = f"lit_longctx-{controller.nodemanager.testrunuid}"
        shutil.rmtree(Path(tempfile.gettempdir()) / folder, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("--differences"):
        import differences

        terminalreporter.write_line("\n" + differences.table())


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    import torch

    torch.manual_seed(0)
    figures.FOUND.clear()
    yield
    request.node.user_properties += [("figure", text) for text in figures.FOUND]
