"""Updates that are left out because loss or gradient norm shot up."""

from collections import deque
from math import isfinite
from statistics import fmean, stdev
from typing import Any, final


@final
class SpikeGuard:
    """Finds steps whose loss or gradient norm lies far above those before (SkipStepAdamW).

    The rule is that of OLMo-core's optimizer of that name: a value is a spike when it exceeds the
    mean of the last `steps` values by more than `deviations` standard deviations. The first
    steps // 2 values are never spikes; finite spikes count for the mean of later ones.

    Args:
        deviations: k, standard deviations above the mean that are still no spike.
        steps: Steps that mean and deviation are taken over.
    """

    def __init__(self, deviations: float = 6.0, steps: int = 128) -> None:
        if not 0 < deviations < float("inf"):
            raise ValueError(f"spike_guard.deviations {deviations} must be above 0")
        if steps < 4:
            raise ValueError(f"spike_guard.steps {steps} must be 4 or more")
        self.deviations = deviations
        self.steps = steps
        self.history: deque[tuple[float, float]] = deque(maxlen=steps)
        """Loss and gradient norm of the last steps."""
        self.skipped = 0
        """Spikes found so far."""

    def is_spike(self, loss: float, grad_norm: float) -> bool:
        """Return whether a step is a spike, and take note of its values."""
        values = (loss, grad_norm)
        found = len(self.history) >= self.steps // 2 and any(
            not value - fmean(before) <= self.deviations * stdev(before)  # NaN is a spike
            for value, before in zip(values, zip(*self.history, strict=True), strict=True)
        )
        if all(map(isfinite, values)):
            self.history.append(values)
        self.skipped += found
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to find the same spikes."""
        return {"history": list(self.history), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.history = deque(map(tuple, state["history"]), maxlen=self.steps)
        self.skipped = state["skipped"]
