"""The record of cells: `record.py` writes one to MLflow, `runs.py` reads it back, `trials.py` mirrors it in Optuna."""
