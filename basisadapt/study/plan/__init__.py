"""Plans: studies with their cells, tuning, search spaces and claims."""

from __future__ import annotations
