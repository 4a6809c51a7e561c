"""The statistics of benchmarks/study_extension.py."""

import runpy
from pathlib import Path

import pytest

scipy_stats = pytest.importorskip("scipy.stats")
STUDY = Path(__file__).parent.parent / "benchmarks" / "study_extension.py"


@pytest.mark.slow
@pytest.mark.parametrize("seeds", range(2, 9))
def test_paired_interval_is_students(seeds):
    study = runpy.run_path(str(STUDY))
    one = [1.0 + 0.1 * i**1.5 for i in range(seeds)]
    other = [0.9 + 0.07 * i for i in range(seeds)]
    found = study["paired"](one, other)
    expected = scipy_stats.ttest_rel(one, other).confidence_interval(0.95)
    assert found.mean == pytest.approx((expected.low + expected.high) / 2)
    assert found.half == pytest.approx((expected.high - expected.low) / 2, rel=1e-3)
    interval = study["Interval"]
    said = [study["shows"](interval(mean, 0.1)) for mean in (0.2, 0.05, -0.05, -0.2)]
    assert said == ["yes", "not told apart", "not told apart", "no: the other way round"]
