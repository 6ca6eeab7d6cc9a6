"""Running: the engine, searches, and the exchange of cells between machines."""

from __future__ import annotations
