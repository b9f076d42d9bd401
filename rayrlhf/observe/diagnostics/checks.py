"""All checks, and what they find in a run."""

from collections.abc import Mapping, Sequence

from rayrlhf.observe.diagnostics.finding import Check, Finding
from rayrlhf.observe.diagnostics.history import History
from rayrlhf.observe.diagnostics.machinery import MACHINERY_CHECKS
from rayrlhf.observe.diagnostics.policy import POLICY_CHECKS
from rayrlhf.observe.diagnostics.responses import RESPONSE_CHECKS

CHECKS: tuple[Check, ...] = (*POLICY_CHECKS, *RESPONSE_CHECKS, *MACHINERY_CHECKS)
"""In the order in which they are told."""


def findings(rows: Sequence[Mapping[str, float | None]]) -> list[Finding]:
    """Return what the newest of some steps show, alarms first.

    Args:
        rows: of `metrics.jsonl`, from the first step on. Rows without a metric, or with null for it, say nothing of it.
    """
    history = History(rows)
    found = []
    for check in CHECKS:
        sign = check.look(history)
        if sign is not None:
            found.append(Finding(check.name, check.severity, sign.since, sign.evidence, check.remedy))
    return sorted(found, key=lambda finding: finding.severity != "alarm")
