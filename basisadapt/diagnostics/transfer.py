"""How many of a transfer function's terms are in use."""

from __future__ import annotations

from torch import Tensor

ACTIVE_SHARE = 0.1


def active_count(terms: Tensor) -> int:
    """Active N: the number of φ's N terms that matter on the range in use; 0 if φ is zero there.

    terms: shape (K, N), the terms αᵢ b(ωᵢ, x, xᵢ) at K points of that range, centered if φ is. A term is active if its
    largest |value| is above ACTIVE_SHARE of the largest term's. Active N over N is the metric "utilisation".

    The paper counts "active coefficients" (Tables 14 to 16) and states no threshold. A threshold on αᵢ alone would also
    count terms whose support BA never reaches.
    """
    largest = terms.abs().amax(0)
    return int((largest > ACTIVE_SHARE * largest.max()).sum())
