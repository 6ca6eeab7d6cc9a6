"""Texts of others, such as labels and error messages, within Markdown."""

from __future__ import annotations

import re


def in_markdown(text: str) -> str:
    """The text on one line, with HTML tags escaped."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", " ".join(text.split()))
