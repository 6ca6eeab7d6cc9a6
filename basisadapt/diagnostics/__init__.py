"""What an update looks like, as plain numbers."""

from __future__ import annotations
