"""The ground: what every package may use, and which knows none of them."""

from __future__ import annotations
