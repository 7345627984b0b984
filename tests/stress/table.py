"""Results of experiments as lines of a terminal and as a table of Markdown."""

from collections.abc import Sequence

from tests.stress.material import Report


def line(report: Report, seconds: float) -> str:
    """One line, and one for each fault."""
    head = f"{report.name}: {report.outcomes} ({seconds:.0f} s)"
    return "\n".join([head, *(f"  WRONG {fault}" for fault in report.faults)])


def markdown(rows: Sequence[tuple[Report, float]], facts: Sequence[str]) -> str:
    """The table of a start, with how it came about."""
    lines = [
        *(f"- {fact}" for fact in facts),
        "",
        "| experiment | cases | outcome | seconds |",
        "|---|---:|---|---:|",
    ]
    for report, seconds in rows:
        lines.append(f"| {report.name} | {report.cases} | {report.outcomes} | {seconds:.0f} |")
    faults = [fault for report, _ in rows for fault in report.faults]
    if faults:
        lines += ["", "What went wrong:", "", *(f"- {' '.join(fault.split())[:600]}" for fault in faults)]
    return "\n".join(lines) + "\n"
