"""Sections for tests of ``bench.gpu``'s driver: they need neither torch nor time."""

from __future__ import annotations

from typing import Any

from bench.gpu.report import Absent


def figures() -> dict[str, int]:
    return {"answer": 42}


def fail() -> None:
    raise ValueError("this one is wrong")


def absent() -> None:
    raise Absent("no such thing here")


def run(report: Any) -> None:
    report.attempt("figures", figures)
    report.attempt("absent", absent)
    report.attempt("last", figures)


def one_row_fails(report: Any) -> None:
    report.attempt("figures", figures)
    report.attempt("wrong", fail)
    report.attempt("last", figures)


def dies_at_once(report: Any) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def raises(report: Any) -> None:
    report.attempt("figures", figures)
    raise RuntimeError("outside of any check")
