"""Studies: one YAML file per table of the paper, run as an Optuna study and recorded in MLflow."""

from __future__ import annotations
