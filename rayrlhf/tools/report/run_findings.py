"""Report section of diagnostic findings, current and resolved."""

from collections.abc import Iterator, Sequence

from rayrlhf.observe.diagnostics import CHECKS, Finding, findings
from rayrlhf.observe.html.page import Block, DataTable, Heading, Paragraph
from rayrlhf.tools.report.run_blocks import Notice
from rayrlhf.tools.report.run_view import RunView

ALARM_PREFIX = "alarm/"


def findings_section(view: RunView) -> Iterator[Block]:
    """Yield findings with evidence and remedy, alarms first, or a notice that there are none."""
    if view.kind != "PPO" or not view.rows:
        return
    found = findings(view.rows)
    yield Heading("Findings")
    for finding in found:
        yield notice(finding)
    if not found:
        yield Notice("good", f"None of the {len(CHECKS)} checks has a finding at the newest step")
    earlier = earlier_alarms(view, found)
    if earlier:
        yield Paragraph("Recorded during the run, and resolved at its newest step:")
        yield DataTable(["finding", "steps", "first step", "last step"], earlier)


def notice(finding: Finding) -> Notice:
    """Return a finding as a notice with name, evidence and remedy."""
    title = f"{finding.name.replace('_', ' ').capitalize()}, since step {finding.since_step:,}"
    return Notice(
        "bad" if finding.severity == "alarm" else "warning",
        title,
        [f"{finding.evidence[:1].upper()}{finding.evidence[1:]}.", finding.remedy],
    )


def earlier_alarms(view: RunView, found: Sequence[Finding]) -> list[tuple[str, int, int, int]]:
    """Return (finding, number of steps, first, last) of recorded findings that are resolved."""
    present = {finding.name for finding in found}
    earlier = []
    for name, series in sorted(view.series.items()):
        label = name.removeprefix(ALARM_PREFIX)
        steps = [int(step) for step, value in zip(series.steps, series.values, strict=True) if value]
        if name.startswith(ALARM_PREFIX) and label not in present and steps:
            earlier.append((label.replace("_", " "), len(steps), steps[0], steps[-1]))
    return earlier
