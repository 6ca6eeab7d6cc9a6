"""Execution: where cells run (in this process, in workers) and the program that runs a file of them."""

from __future__ import annotations
