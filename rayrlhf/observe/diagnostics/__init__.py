"""What is wrong with a run, in plain words with a remedy, from its metrics alone. A check is one function of a `History`."""

from rayrlhf.observe.diagnostics.diagnosis import CHECKS, Diagnosis, findings
from rayrlhf.observe.diagnostics.finding import Check, Finding, Severity, Sign
from rayrlhf.observe.diagnostics.history import History

__all__ = ["CHECKS", "Check", "Diagnosis", "Finding", "History", "Severity", "Sign", "findings"]
