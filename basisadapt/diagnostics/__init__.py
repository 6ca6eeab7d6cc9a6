"""Measurements of updates, losses and training paths, as plain numbers, and figures of them."""
