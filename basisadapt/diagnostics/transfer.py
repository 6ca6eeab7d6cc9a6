"""How much of a transfer function is in use."""

from __future__ import annotations

from torch import Tensor

ACTIVE_SHARE = 0.1


def active_count(terms: Tensor) -> int:
    """Active N: how many of φ's N terms matter on the range in use.

    terms: (K, N), what each term adds to φ, αᵢ b(ωᵢ, x, xᵢ), centred if φ is, at K points of that range. A term is
    active if its largest |value| is above ACTIVE_SHARE of the largest term's; 0 if φ is zero. Active N over N is the
    utilisation. The paper counts "active coefficients" (Tables 14 to 16) and states no threshold; one that looks at
    αᵢ alone would call a term active whose support BA never reaches.
    """
    largest = terms.abs().amax(0)
    return int((largest > ACTIVE_SHARE * largest.max()).sum())
