"""Findings as tables."""

from __future__ import annotations

from vitfast.check.findings import OK, REFUSED, WRONG, Finding, model_table, op_table


def test_tables_show_the_worst_and_the_state():
    def finding(**changes):
        values = {
            "level": "op", "name": "a", "case": "s", "dtype": "float32", "passes": "forward",
            "backend": "cpu", "state": OK, "error_over_budget": 0.2,
        }  # fmt: skip
        return Finding(**{**values, **changes})

    header, lines = op_table(
        [
            finding(picked=True),
            finding(case="t", error_over_budget=0.7),
            finding(backend="vendor", state=REFUSED, error_over_budget=None),
            finding(backend="cuda", state=WRONG, error_over_budget=3.0),
            finding(level="model"),
        ]
    )
    assert header == ("op", "backend", "float32 forward", "state", "picked")
    assert lines == [
        ("a", "cpu", "0.70", "ok", "1 of 2"),
        ("a", "vendor", "-", "cannot run", ""),
        ("a", "cuda", "3.00", "wrong", ""),
    ]
    assert model_table([finding(level="model")])[1] == [("a", "s", "0.20", "ok")]
