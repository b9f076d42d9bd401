"""Likely causes of the first difference of two runs, from their settings, machines and metrics."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from rayrlhf.observe.metric_names import LOGPROB_GAP
from rayrlhf.tools.report.run_view import RunView

Phase = Literal["prompts", "responses", "rewards", "experience", "update", "weight sync", "evaluation"]
GAP_FACTOR, GAP_NATS = 3.0, 1e-3
"""A log-prob gap this many times, and by this much, above the other run's shows that weights did not arrive."""


@dataclass(frozen=True, slots=True)
class Cause:
    """A kind of cause.

    Attributes:
        name: in words.
        phases: in which its effect may be seen first.
        settings: beginnings of the keys that bring it about.
        facts: beginnings of keys of `environment.json` that do.
        rounding: it changes rounding only, so a large difference has another cause.
    """

    name: str
    phases: tuple[Phase, ...]
    settings: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    rounding: bool = False


_NUMBERS: tuple[Phase, ...] = ("responses", "rewards", "experience", "update", "evaluation")
CAUSES = (
    Cause("other seed", ("prompts", "responses"), ("run.seed",)),
    Cause("other data, template or data order", ("prompts",), ("data.", "rollout.demonstrations")),
    Cause(
        "other size of a step",
        ("prompts",),
        ("rollout.prompts_per_step", "rollout.samples_per_prompt", "rollout.refill_rounds", "rollout.overissue", "async."),
    ),
    Cause("other dtype", _NUMBERS, ("model.dtype", "rollout.dtype", "critic.model.dtype")),
    Cause("other number of replicas", ("responses",), ("rollout.replicas", "placement.rollout"), rounding=True),
    Cause("other model or adapters", _NUMBERS, ("model.", "critic.model.", "reference.", "teacher.", "sft_warmup.")),
    Cause("other sampling settings", ("responses", "evaluation"), ("rollout.", "environment.", "evaluation.")),
    Cause("other engine version", ("responses", "evaluation"), facts=("packages.vllm", "packages.transformers")),
    Cause("other reward", ("rewards", "evaluation"), ("reward.", "environment.")),
    Cause("other algorithm", ("experience", "update"), ("algorithm.", "parity.", "critic.", "async.")),
    Cause(
        "other optimizer or mini-batches",
        ("update",),
        (
            "train.learning_rate",
            "train.optimizer.",
            "train.schedule.",
            "train.epochs",
            "train.mini_batch_size",
            "train.max_grad_norm",
        ),
    ),
    Cause(
        "other micro-batch split or number of ranks",
        ("experience", "update"),
        ("train.micro_batch", "train.score_batch", "train.share_prefixes", "train.zero", "placement.", "train.pack"),
        rounding=True,
    ),
    Cause(
        "other library versions",
        _NUMBERS,
        facts=("packages.torch", "packages.deepspeed", "packages.peft", "packages.numpy", "packages.rayrlhf"),
    ),
    Cause("other hardware", _NUMBERS, facts=("processor", "gpus", "cores", "threads"), rounding=True),
)


def likely_causes(one: RunView, two: RunView, phase: Phase, step: int, size: float | None) -> list[str]:
    """Return causes of a difference, each a line with its evidence, the likeliest first.

    Args:
        phase: where the runs differ first.
        size: relative difference; None for a difference that is not a number.
    """
    found = [*_missing_weights(one, two, phase, step)]
    settings, facts = changed(one.config, two.config), changed(one.environment, two.environment)
    named: set[str] = set()
    for cause in sorted(CAUSES, key=lambda cause: cause.rounding and size is not None and size > 1e-3):
        if phase not in cause.phases:
            continue
        lines = [
            line for key, line in settings.items() if key.startswith(cause.settings) and cause.settings and key not in named
        ]
        lines += [line for key, line in facts.items() if key.startswith(cause.facts) and cause.facts]
        named |= {key for key in settings if key.startswith(cause.settings) and cause.settings}
        if lines:
            found.append(f"{cause.name}: {'; '.join(lines[:4])}{f'; and {len(lines) - 4} more' if len(lines) > 4 else ''}")
    return found or [_without_evidence(one, phase, step)]


def changed(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, str]:
    """Return a line for each setting or fact that differs, by its dotted key."""
    first, second = flat(one), flat(two)
    keys = [key for key in dict.fromkeys([*first, *second]) if first.get(key) != second.get(key)]
    ignored = ("run.name", "run.root", "observe.", "checkpoint.", "memory_gib", "models.")
    return {key: f"{key} {first.get(key)} -> {second.get(key)}" for key in keys if not key.startswith(ignored)}


def _missing_weights(one: RunView, two: RunView, phase: Phase, step: int) -> Iterator[str]:
    """Yield the run whose rollout engine did not have the trainer's weights."""
    gaps = [_at(view, LOGPROB_GAP, step) for view in (one, two)]
    if phase not in ("responses", "rewards", "experience", "update") or None in gaps:
        return
    low, high = sorted(gap for gap in gaps if gap is not None)
    if high > GAP_FACTOR * low and high - low > GAP_NATS:
        view = one if gaps[0] == high else two
        yield (
            f"weights not arrived in {view.name}: the log-probs of its trainer and rollout engine differ by {high:.3g} nats at "
            f"step {step}, those of the other run by {low:.3g}"
        )


def _without_evidence(view: RunView, phase: Phase, step: int) -> str:
    exact = view.setting("run", "determinism") == "exact"
    if phase == "responses" and not exact:
        return (
            "no setting or version differs: without run.determinism=exact a response depends on the batch that it is sampled in"
        )
    if phase == "rewards":
        return "no setting or version differs: the reward does not give the same text the same score, such as a remote judge"
    if phase == "prompts":
        return "no setting differs: the data files may have changed, or a prompt was lost or repeated"
    where = "" if step <= 1 else f", and the runs agree up to step {step - 1}"
    return (
        f"no setting, version or machine differs{where}: sums in another order (threads, GPU kernels), or a fault in this phase"
    )


def _at(view: RunView, metric: str, step: int) -> float | None:
    series = view.series.get(metric)
    values: Mapping[float, float] = dict(zip(series.steps, series.values, strict=True)) if series else {}
    return values.get(step)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a tree of settings as dotted key -> value in YAML syntax."""
    leaves: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10_000)
            leaves[f"{prefix}{key}"] = text.removesuffix("\n...\n").strip()
    return leaves
