"""How loss falls with context: L(c) = (α/c)^β + γ (Xiong et al. 2023, arXiv:2309.16039, Fig. 1).

For a given β the law is linear in α^β and γ, so that fitting is a search over one number. Outliers
count less (Huber's loss); intervals come from drawing measurements anew (bootstrap).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

BETAS = np.geomspace(0.02, 4.0, 240)
"""Exponents that are tried before the best is refined."""
HUBER = 1.345
"""Residuals beyond this many deviations count linearly: 95 % as sharp as least squares on noise
that is normal (Huber 1981)."""


class PowerLaw(NamedTuple):
    """L(c) = (α/c)^β + γ, in nats per token of c tokens of context."""

    alpha: float
    """Tokens of context at which the loss is γ + 1."""
    beta: float
    """How fast context pays."""
    gamma: float
    """Loss that no context takes away."""

    def __call__(self, context: Sequence[float] | np.ndarray) -> Float[np.ndarray, " lengths"]:
        """Loss at each context length."""
        return (self.alpha / np.asarray(context, dtype=np.float64)) ** self.beta + self.gamma


class Fitted(NamedTuple):
    """A law with what the bootstrap says of it."""

    law: PowerLaw
    low: PowerLaw
    """Lower ends of the parameters' intervals."""
    high: PowerLaw
    """Upper ends."""
    draws: list[PowerLaw]
    """The law of every draw: for intervals of anything that follows from it."""

    @property
    def identified(self) -> bool:
        """Whether β stays within the exponents that were tried, and α within a factor of 1,000."""
        within = BETAS[0] < self.low.beta and self.high.beta < BETAS[-1]
        return bool(within and self.high.alpha < 1000 * self.low.alpha)

    def interval(
        self, context: Sequence[float], share: float = 0.95
    ) -> tuple[Float[np.ndarray, " lengths"], Float[np.ndarray, " lengths"]]:
        """Ends of the interval of the law's loss at each length, also at those not fitted."""
        losses = np.stack([law(context) for law in self.draws])
        low, high = np.quantile(losses, [(1 - share) / 2, (1 + share) / 2], axis=0)
        return low, high


def fit_power_law(context: Sequence[float], loss: Sequence[float] | np.ndarray) -> PowerLaw:
    """Fit a law to mean losses.

    Args:
        context: Tokens of context, three different lengths or more.
        loss: Nats per token at each.

    Raises:
        ValueError: Fewer than three lengths, or what is no positive, finite number.
    """
    c, nats = np.asarray(context, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    if c.shape != nats.shape or len(set(c.tolist())) < 3:
        raise ValueError(
            f"a power law needs losses at 3 different lengths or more; got {len(set(c.tolist()))}"
        )
    if not (np.isfinite(nats).all() and (c > 0).all() and np.isfinite(c).all()):
        raise ValueError("lengths must be above 0 and losses finite; leave out what is not")
    weights = np.ones_like(nats)
    law = PowerLaw(1.0, 1.0, 0.0)
    for _ in range(8):
        beta, scale, gamma = _search(c, nats, weights, BETAS)
        for width in (1.025, 1.0025, 1.00025):  # around the best, ten times as fine each time
            near = np.geomspace(beta / width, beta * width, 21)
            beta, scale, gamma = _search(c, nats, weights, near)
        law = PowerLaw(scale ** (1 / beta), beta, gamma)
        residuals = np.abs(nats - law(c))
        deviation = 1.4826 * np.median(residuals)
        if deviation < 1e-9:
            break
        weights = np.minimum(1.0, HUBER * deviation / np.maximum(residuals, 1e-300))
    return law


def _search(
    c: np.ndarray, nats: np.ndarray, weights: np.ndarray, betas: np.ndarray
) -> tuple[float, float, float]:
    """Return β, α^β and γ of least weighted squares among some β; γ is not below 0."""
    x = c ** -betas[:, None]
    total = weights.sum()
    mean_x, mean_y = (x * weights).sum(1) / total, (nats * weights).sum() / total
    spread = ((x - mean_x[:, None]) ** 2 * weights).sum(1)
    scale = ((x - mean_x[:, None]) * (nats - mean_y) * weights).sum(1) / spread
    gamma = mean_y - scale * mean_x
    through_zero = (x * nats * weights).sum(1) / (x**2 * weights).sum(1)
    scale, gamma = np.where(gamma < 0, through_zero, scale), np.maximum(gamma, 0.0)
    falls = scale > 1e-12
    scale, gamma = np.where(falls, scale, 1e-12), np.where(falls, gamma, mean_y)
    errors = ((nats - scale[:, None] * x - gamma[:, None]) ** 2 * weights).sum(1)
    best = int(errors.argmin())
    if not falls[best]:  # flat or rising: no exponent is better than another
        best = 0
    return float(betas[best]), float(scale[best]), float(gamma[best])


def fit_scaling(
    context: Sequence[float],
    losses: Float[np.ndarray, "samples lengths"],
    draws: int = 400,
    share: float = 0.95,
    seed: int = 0,
) -> Fitted:
    """Fit a law to the mean loss over samples, with bootstrap intervals.

    Costs about 3 ms a draw.

    Args:
        context: Tokens of context of each column.
        losses: Nats per token; a row is what is drawn together, such as a document; nan where it
            has no value.
        draws: Bootstrap draws of rows.
        share: Coverage of the intervals.
        seed: Decides the draws.
    """
    if len(losses) < 2:
        raise ValueError(f"intervals need 2 samples or more; got {len(losses)}")
    generator = np.random.default_rng(seed)
    drawn = []
    while len(drawn) < draws:
        rows = losses[generator.integers(len(losses), size=len(losses))]
        means = np.nanmean(rows, axis=0)
        drawn.append(fit_power_law(context, means))
    low, high = np.quantile(np.array(drawn), [(1 - share) / 2, (1 + share) / 2], axis=0)
    law = fit_power_law(context, np.nanmean(losses, axis=0))
    return Fitted(law, PowerLaw(*low.tolist()), PowerLaw(*high.tolist()), drawn)


class Extrapolation(NamedTuple):
    """A law fitted to all lengths, and what one without the longest says of it."""

    context: list[float]
    losses: list[float]
    """Mean nats at each length."""
    fitted: Fitted
    predicted: tuple[float, float, float]
    """Loss at the longest length by the law without it, with its interval."""

    def band(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Lengths close to each other, up to twice the longest; the law there and its interval."""
        dense = np.geomspace(self.context[0], 2 * self.context[-1], 50)
        return (dense, self.fitted.law(dense), *self.fitted.interval(dense.tolist()))

    def results(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        law, low, high = (found._asdict() for found in self.fitted[:3])
        parts = {"law": law, "low": low, "high": high, "identified": self.fitted.identified}
        return parts | {key: self._asdict()[key] for key in ("context", "losses", "predicted")}


def extrapolate(
    context: Sequence[float],
    losses: Float[np.ndarray, "samples lengths"],
    draws: int = 200,
    seed: int = 0,
) -> Extrapolation:
    """Fit a law as `fit_scaling` does, once to all of four lengths or more, once without the last.

    A law that holds predicts what it has not seen: the fit without the longest says whether.
    """
    part = fit_scaling(context[:-1], losses[:, :-1], draws, seed=seed)
    low, high = part.interval(context[-1:])
    predicted = (float(part.law(context[-1:])[0]), float(low[0]), float(high[0]))
    means = np.nanmean(losses, axis=0).tolist()
    whole = fit_scaling(context, losses, draws, seed=seed)
    return Extrapolation(list(context), means, whole, predicted)
