"""A job that is hurt again and again, beside its undisturbed twin, and how long each kind of harm took to heal."""

import random
import signal
import statistics
import time
from typing import NamedTuple

from rayrlhf.observe.journal import read_journal
from rayrlhf.observe.samples import read_samples
from tests.chaos.arena import Job, repeatable

PROMPTS = 32
SETTINGS = [
    "rollout.backend=transformers",
    "rollout.replicas=2",
    f"rollout.prompts_per_step={PROMPTS}",
    "rollout.max_new_tokens=24",
    "run.determinism=exact",
    "checkpoint.every=3",
    f"observe.samples_per_step={PROMPTS}",
    "evaluation.enabled=false",
    "recovery.snapshot=step",
    "recovery.ping_every=1",
    "recovery.ping_deadline=8",
]


class Hurt(NamedTuple):
    """What was done to whom and when; `process` is its number, or the node's name."""

    role: str
    kind: str
    at: float
    process: int | str


def run_pair(folder, steps, hurts, seconds, *overrides, seed=5, cluster=None):
    """The twin and the victim, one after the other; each hurt falls at a random moment of a step of its own.

    A hurt is (role, signal), or ("node", name): the node is lost, and another one takes its place three seconds later. A driver
    that ended is started again, as a scheduler would.
    """
    generator = random.Random(seed)
    settings = [*SETTINGS, f"run.steps={steps}", *overrides]
    twin = Job(folder / "twin", *settings, cluster=cluster).start()
    assert twin.wait(seconds) == 0, twin.log[-3000:]
    victim = Job(folder / "victim", *settings, cluster=cluster).start()
    step_seconds = statistics.median(row["time/step"] for row in twin.steps())
    victim.hurts, victim.codes = [], []
    for index, (role, kind) in enumerate(hurts):
        if not victim.wait_for_step(1 + index * (steps - 2) // len(hurts), seconds):
            break
        time.sleep(generator.random() * step_seconds)
        victim.hurts.append(_hurt(victim, role, kind, cluster))
    return twin, victim, victim.wait(seconds)


def _hurt(victim, role, kind, cluster):
    at = time.time()
    if role == "node":
        cluster.ask("lose", kind)
        time.sleep(3)
        cluster.ask("add", kind)
        return Hurt(role, "lost", at, kind)
    process = victim.hurt(role, kind)
    if role == "driver":
        victim.codes.append(victim.wait(100))
        if victim.codes[-1] != 0:
            victim.start()
    return Hurt(role, signal.Signals(kind).name, at, process)


def same_metrics(twin, victim, steps):
    """Every step has the twin's metrics, and its ledger closed over all of its samples."""
    assert [row["step"] for row in victim.steps()] == list(range(1, steps + 1))
    assert {(row["ledger/issued"], row["ledger/trained"]) for row in victim.steps()} == {(PROMPTS, PROMPTS)}
    for mine, other in zip(victim.steps(), twin.steps(), strict=True):
        assert repeatable(mine) == repeatable(other)


def same_samples(twin, victim, steps):
    """No sample is lost, used twice, other than the twin's, or worth something else."""
    keys = ("step", "prompt_id", "sample", "response", "score")
    mine, other = ([tuple(row[key] for key in keys) for row in read_samples(job.folder / "samples")] for job in (victim, twin))
    assert mine == other
    assert len(set(mine)) == len(mine) == steps * PROMPTS


def recovery_seconds(journal):
    """Seconds from loss to recovery by role, as the run itself wrote them down."""
    table = {}
    for event in journal:
        if event["event"] in ("recovered", "replayed"):
            table.setdefault(event["actor"].split("/")[-2], []).append(event["seconds"])
    return table


def healing_seconds(hurts, journal, step_times):
    """Seconds from each harm until everything was back, by (role, kind): the last recovery before the next harm.

    For a driver, which keeps no journal while it is dead, it is the time until the first step was finished again.
    """
    table = {}
    for hurt, following in zip(hurts, [*hurts[1:], None], strict=True):
        end = following.at if following else float("inf")
        healed = [event["time"] for event in journal if event["event"] in ("recovered", "replayed")]
        marks = [mark for mark in (step_times if hurt.role == "driver" else healed) if hurt.at < mark < end]
        if marks:
            back = min(marks) if hurt.role == "driver" else max(marks)
            table.setdefault((hurt.role, hurt.kind), []).append(back - hurt.at)
    return table


def print_table(victim):
    written = [path.stat().st_mtime for path in (victim.folder / "samples").glob("*.parquet")]
    table = healing_seconds(victim.hurts, read_journal(victim.folder), written)
    for (role, kind), seconds in sorted(table.items()):
        times = f"median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s"
        print(f"{role} {kind}: {len(seconds)} times, {times}")
    return True
