"""How the values of an evaluation are written for people."""

import pytest

from fastdisco.commands import measure
from fastdisco.evals import results

VALUES = {"map": 0.17104, "retrieve_queries": 10000.0, "sgd_lr_selected": 0.003, "rankme": 261.3505}


@pytest.mark.parametrize(
    "value, text",
    [(10000.0, "10000"), (1281167.0, "1281167"), (0.0, "0"), (261.3505, "261.4"), (3e-7, "3e-07")],
)
def test_a_count_has_all_its_digits(value, text):
    assert results.number(value) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_finite_number_is_written_as_such(value):
    assert results.number(value) == str(value)


def test_tables_and_lines_write_counts_whole():
    result = results.make("retrieve", VALUES, {"network": {}, "versions": {}}, 1.0)
    row = results.table({"a": [result]}).rows[0]
    assert row == ["a", "17.10", "10000", "0.003", "261.4"]
    assert "retrieve_queries 10000, " in measure.summary(result)
