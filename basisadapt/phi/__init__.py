"""The mathematics of φ(BA). Knows torch alone."""

from __future__ import annotations

from basisadapt.phi import bases as bases  # registers them
