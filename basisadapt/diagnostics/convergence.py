"""How fast a loss falls: loss − floor ∝ t^exponent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

STEEPEST = -4.0
STARTS = (-0.25, -0.5, -1.0, -2.0, -3.0)
FEWEST = 8  # points


@dataclass(frozen=True)
class PowerLaw:
    """loss(t) = floor + drop · (t / unit)^exponent.

    - `floor` (float ≥ 0): the limit of the loss.
    - `drop` (float ≥ 0): how far above the limit the loss is at t = unit.
    - `exponent` (float < 0): the rate of convergence.
    - `unit` (float > 0): a number of steps.
    """

    floor: float
    drop: float
    exponent: float
    unit: float

    def __call__(self, t: float) -> float:
        """The loss after t > 0 steps."""
        return float(self.floor + self.drop * (t / self.unit) ** self.exponent)


def fit_power_law(curve: Sequence[tuple[int, float]]) -> PowerLaw | None:
    """The power law of a logged loss, [(step, mean loss since the previous entry), ...]; the exponents of Table 15.

    The fit minimizes the Cauchy loss Σ ln(1 + x²), which is robust to single bad batches, over 0 ≤ floor, 0 ≤ drop and
    STEEPEST ≤ exponent ≤ 0, from several starts. The residuals x are in units of the noise, estimated from second
    differences. Returns None if the data do not determine an exponent: fewer than FEWEST points, or an exponent less
    than two standard errors away from 0 (Gauss-Newton, over the parameters that are not at a bound).

    The paper prints t^exponent and names neither quantity nor method. Here a floor is fitted too: without one, the
    exponent of any loss that does not end at 0 is near 0. A loss that has hardly begun to fall shows no floor, and is
    fitted with floor 0 and an exponent near 0. A warm-up flattens the start and with it the exponent.
    """
    import numpy as np
    from scipy.optimize import least_squares

    points = np.array([point for point in curve if np.isfinite(point[1])], dtype=np.float64)
    if len(points) < FEWEST:
        return None
    step, loss = points.T
    t = (np.concatenate([[0.0], step[:-1]]) + 1 + step) / 2  # the middle of the steps that an entry averages
    unit = float(np.exp(np.log(t).mean()))
    spread = float(np.ptp(loss))
    # Of independent noise σ, second differences have the variance 6σ²; 1.48 makes a median absolute value a σ.
    noise = 1.4826 * float(np.median(np.abs(np.diff(loss, 2)))) / 6**0.5
    scale = max(noise, 1e-3 * spread)
    if spread == 0:
        return None

    def residuals(law: NDArray[float64]) -> NDArray[float64]:
        return np.asarray((law[0] + law[1] * (t / unit) ** law[2] - loss) / scale)

    def derivatives(law: NDArray[float64]) -> NDArray[float64]:
        falling = (t / unit) ** law[2]
        return np.stack([np.ones_like(t), falling, law[1] * falling * np.log(t / unit)], 1) / scale

    bounds = ([0.0, 0.0, STEEPEST], [np.inf, np.inf, 0.0])
    first = [max(float(loss.min()), 0.0), spread / 2]
    fits = [
        least_squares(residuals, [*first, start], jac=derivatives, bounds=bounds, loss="cauchy") for start in STARTS
    ]
    best = min(fits, key=lambda fit: float(fit.cost))
    floor, drop, exponent = map(float, best.x)
    free = best.active_mask == 0
    jacobian = np.asarray(best.jac, dtype=np.float64)[:, free]
    hessian = jacobian.T @ jacobian
    if not free[2] or np.linalg.cond(hessian) > 1e12:
        return None
    error = math.sqrt(2 * best.cost / (len(points) - 3) * np.linalg.inv(hessian)[-1, -1])
    return PowerLaw(floor, drop, exponent, unit) if exponent < -2 * error else None
