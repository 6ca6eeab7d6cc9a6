"""The record: the stores, with MLflow's runs and Optuna's trials."""

from __future__ import annotations
