"""What is said of it: tables, verdicts, figures, and their files."""

from __future__ import annotations
