"""Metrics of classes and of numbers."""

from __future__ import annotations

import numpy as np


def of_classes(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 as the mean over classes, and Matthews' correlation of the likeliest classes.

    scores: shape (rows, classes); labels: shape (rows,), class indices.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    chosen = scores.argmax(axis=-1)
    return {
        "accuracy": float(np.mean(chosen == labels)),
        "macro_f1": float(f1_score(labels, chosen, average="macro")),
        "matthews": float(matthews_corrcoef(labels, chosen)),
    }


def of_numbers(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0 where either side is constant, which tells nothing apart.

    scores: shape (rows, 1) or (rows,); labels: shape (rows,).
    """
    from scipy import stats

    predicted = scores.reshape(-1).astype(float)
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(stats.pearsonr(predicted, labels).statistic),
        "spearman": float(stats.spearmanr(predicted, labels).statistic),
    }
