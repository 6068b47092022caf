"""Classes with an order: what the report's table says of them."""

from __future__ import annotations

import numpy as np

from training import metrics
from training.results import metrics_table


def words_of(ordered: bool) -> dict[str, str]:
    truth = np.arange(12) % 3
    values = metrics.summarise(
        truth, np.eye(3)[truth], group=truth.astype(str), fold=truth * 0, repeat=truth * 0, resamples=2, ordered=ordered
    )
    return {str(row[0]): str(row[2]) for row in metrics_table(dict(values), "").rows}


def test_the_table_has_quadratic_kappa_only_where_the_classes_have_an_order() -> None:
    plain, ordered = words_of(False), words_of(True)
    assert "kappa" in plain and "kappa quadratic" not in plain and "mean level error" not in plain
    assert "order of the classes" in ordered["kappa quadratic"] and "levels" in ordered["mean level error"]
    assert all(plain.values()) and all(ordered.values())
