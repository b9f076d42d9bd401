"""`rayrlhf doctor`: look at the machine, tell what is wrong and how to mend it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from rayrlhf.tools.doctor.checks import Diagnosis, examine
from rayrlhf.tools.doctor.facts import gather

MARKS = {"ok": "ok     ", "warning": "warning", "broken": "BROKEN "}


def run_doctor(*, as_json: bool, echo: Callable[[str], None]) -> bool:
    """Examine this machine and tell; returns whether a run can work here."""
    found = examine(gather())
    echo(to_json(found) if as_json else to_text(found))
    return not any(diagnosis.level == "broken" for diagnosis in found)


def to_json(found: Sequence[Diagnosis]) -> str:
    """A list of objects, for programs."""
    return json.dumps([asdict(diagnosis) for diagnosis in found], indent=1)


def to_text(found: Sequence[Diagnosis]) -> str:
    """A line a diagnosis, its fix below it, and a last line with the count."""
    lines = []
    for diagnosis in found:
        lines.append(f"{MARKS[diagnosis.level]}  {diagnosis.check}: {diagnosis.found}")
        if diagnosis.fix:
            lines.append(f"         -> {diagnosis.fix}")
    broken, warnings = (sum(diagnosis.level == level for diagnosis in found) for level in ("broken", "warning"))
    lines.append(f"{broken} broken, {warnings} warnings" if broken or warnings else "everything is in order")
    return "\n".join(lines)
