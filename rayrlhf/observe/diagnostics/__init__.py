"""Diagnosis of a run from its metrics; each check is a function of a `History`."""

from rayrlhf.observe.diagnostics.diagnosis import CHECKS, Diagnosis, findings
from rayrlhf.observe.diagnostics.finding import Check, Finding, Severity, Sign
from rayrlhf.observe.diagnostics.history import History

__all__ = ["CHECKS", "Check", "Diagnosis", "Finding", "History", "Severity", "Sign", "findings"]
