"""Numbers as a report writes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from basisadapt.study import statistics
from basisadapt.study.plan.spec import Reference
from basisadapt.study.report.table import Table
from basisadapt.study.statistics import Difference

DASH = "-"
NumberForm = Callable[[float | None, str], str]  # a value and its sign option ("" or "+") to text


class MetricFormat(NamedTuple):
    """How a metric is shown: its column head, its format specification, and the unit that divides it."""

    head: str
    number: str
    unit: float = 1


METRIC_FORMATS = {  # for the metrics that need more than the default
    "stable_rank.mean": MetricFormat("stable rank", ".2f"),
    "dc_share.mean": MetricFormat("DC share", ".3f"),
    "parameters.trainable": MetricFormat("trainable", ",.0f"),
    "linear_fit.mean": MetricFormat("linear fit c", ".3g"),
    "nonlinear_share.mean": MetricFormat("nonlinear share", ".2%"),
    "nonlinear_share.largest": MetricFormat("largest share", ".2%"),
    "bits / parameters.trainable": MetricFormat("bits a number", ".3f"),
    "adapter.bytes": MetricFormat("adapter, MB", ",.2f", 1e6),
    "memory.peak_bytes": MetricFormat("peak memory, MB", ",.0f", 1e6),
    "seconds.train": MetricFormat("training, s", ",.1f"),
    "tokens_per_second": MetricFormat("tokens/s", ",.0f"),
}


def number_form(table: Table) -> NumberForm:
    """The format of the headline metric: a percentage with two decimals, or a number with four, from 10,000 one."""
    scale, digits = (100, 2) if table.percent else (1, 4)
    if any(abs(value) >= 10_000 for line in table.lines for value in line.values.values()):
        digits = 1
    return lambda value, sign: DASH if value is None else f"{value * scale:{sign}.{digits}f}"


def headline_text(table: Table) -> str:
    """The column head of the headline metric: "accuracy, %"."""
    return f"{table.headline}, %" if table.percent else table.headline


def metric_head(metric: str) -> str:
    """The column head of a recorded metric."""
    return METRIC_FORMATS[metric].head if metric in METRIC_FORMATS else metric.removesuffix(".mean").replace("_", " ")


def metric_text(name: str, value: float | None) -> str:
    """The value of a recorded metric in its unit; DASH for None."""
    if value is None:
        return DASH
    form = METRIC_FORMATS.get(name, MetricFormat("", ",.0f" if abs(value) >= 1000 else ".3g"))
    return format(value / form.unit, form.number)


def difference_text(difference: Difference | None, number: NumberForm) -> str:
    """ "+0.42 [-0.10, +0.94]", the mean difference and its confidence interval; DASH for None."""
    if difference is None:
        return DASH
    known = difference.low is not None
    interval = f" [{number(difference.low, '+')}, {number(difference.high, '+')}]" if known else ""
    return number(difference.mean, "+") + interval


def score_text(values: Collection[float], number: NumberForm) -> str:
    """ "50.20 ± 0.10", mean and sample standard deviation of a row's scores."""
    scores = list(values)
    return with_std(number(statistics.mean(scores), ""), number(statistics.std(scores), ""))


def with_std(value: str, std: str | None) -> str:
    """ "50.20 ± 0.10"; the value alone if there is no standard deviation."""
    return value if std in (None, "", DASH) else f"{value} ± {std}"


def p_text(p: float | None) -> str:
    """A p-value with three decimals, "< 0.001" below that; DASH for None."""
    return DASH if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def setting_text(value: object) -> str:
    """The value of a setting, floats with three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def seed_names(seeds: Sequence[int]) -> str:
    """ "seed 1", or "seeds 1, 2"."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def reference_text(reference: Reference) -> str:
    """The label of the reference row; for an axis value, what it stands for."""
    return reference.value if reference.axis is None else f"the row with {reference} that is otherwise equal"
