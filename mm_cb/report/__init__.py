"""Reports of a run: one self-contained HTML page, and a table for the terminal."""

from mm_cb.report.page import refuse_no_page, write_report
from mm_cb.report.table import headline_table
from mm_cb.report.terminal import print_table
from mm_cb.report.verdict import PageVerdict, judge_report, judge_run

__all__ = [
    "PageVerdict",
    "headline_table",
    "judge_report",
    "judge_run",
    "print_table",
    "refuse_no_page",
    "write_report",
]
