"""What shall run: studies, their cells, tuning, search spaces and claims."""

from __future__ import annotations
