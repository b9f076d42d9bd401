"""Working and waiting times of the roles, from the spans of a trace.

The driver's trace names phases; a phase is the work of a role, so the spans of a phase are that role's working time as measured
by the driver. A role waits while it has no span and another has one; its waiting shares per other role show the bottleneck.
Spans of actors that trace themselves keep their own names.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rayrlhf.tools.report.run_files import WorkSpan

DRIVER = "driver"
PHASE_ROLES = {
    "generate": ("rollout",),
    "greedy": ("rollout",),
    "reward": ("reward",),
    "judge": ("judge",),
    "reference": ("reference",),
    "teacher": ("teacher",),
    "critic": ("critic",),
    "policy": ("policy",),
    "update_policy": ("policy",),
    "update_critic": ("critic",),
    "weight_sync": ("policy", "rollout"),
    "checksums": ("policy",),
}
"""Phase of the driver -> the roles that work in it; any other phase is the driver's own."""
ROLE_ORDER = ("rollout", "reward", "judge", "reference", "teacher", "critic", "policy", DRIVER)


@dataclass(frozen=True, slots=True)
class RoleSpan:
    """An interval of a role's work on a phase; seconds since the epoch."""

    role: str
    phase: str
    start: float
    end: float
    step: int | None


@dataclass(frozen=True, slots=True)
class RoleTime:
    """Shares of the observed time in which a role worked or waited for others.

    Attributes:
        waited: role that was working -> share of the observed time; several at once get equal parts.
    """

    role: str
    busy: float
    waited: dict[str, float]


def role_spans(spans: Sequence[WorkSpan]) -> list[RoleSpan]:
    """Return the spans by role, in order of their start."""
    found = []
    for span in spans:
        roles = PHASE_ROLES.get(span.name, (span.actor,)) if span.actor == DRIVER else (span.actor,)
        found += [RoleSpan(role, span.name, span.start, span.end, span.step) for role in roles]
    return sorted(found, key=lambda span: span.start)


def role_order(spans: Sequence[RoleSpan]) -> list[str]:
    """Return the roles of the spans in step order, others by name."""
    places = {role: place for place, role in enumerate(ROLE_ORDER)}
    return sorted({span.role for span in spans}, key=lambda role: (places.get(role, len(places)), role))


def last_steps(spans: Sequence[RoleSpan], steps: int) -> list[RoleSpan]:
    """Return the spans of the last steps, or the last 200 spans without step numbers."""
    numbers = sorted({span.step for span in spans if span.step is not None})[-steps:]
    return [span for span in spans if span.step in numbers] if numbers else list(spans[-200:])


def role_times(spans: Sequence[RoleSpan]) -> list[RoleTime]:
    """Return each role's working and waiting shares of the busy time; [] without spans."""
    roles = role_order(spans)
    moments = sorted(
        [(span.start, 1, span.role) for span in spans if span.end > span.start]
        + [(span.end, -1, span.role) for span in spans if span.end > span.start]
    )
    busy: defaultdict[str, float] = defaultdict(float)
    waited: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    active: defaultdict[str, int] = defaultdict(int)
    total, since = 0.0, moments[0][0] if moments else 0.0
    for moment, change, role in moments:
        seconds, working = moment - since, [name for name in roles if active[name]]
        if seconds > 0 and working:
            total += seconds
            for name in roles:
                if active[name]:
                    busy[name] += seconds
                else:
                    for other in working:
                        waited[name][other] += seconds / len(working)
        active[role] += change
        since = moment
    if not total:
        return []
    return [RoleTime(r, busy[r] / total, {o: waited[r][o] / total for o in roles if waited[r][o]}) for r in roles]
