"""Metrics of classification and of regression."""

from __future__ import annotations

import numpy as np


def of_classes(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation of the class with the highest score.

    scores: shape (rows, classes); labels: class indices, shape (rows,).
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    chosen = scores.argmax(axis=-1)
    return {
        "accuracy": float(np.mean(chosen == labels)),
        "macro_f1": float(f1_score(labels, chosen, average="macro")),
        "matthews": float(matthews_corrcoef(labels, chosen)),
    }


def of_numbers(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation; both are 0 if the scores or the labels are constant.

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
