"""Processes of every role are killed or stopped in the middle of a real job; it ends by itself, as the undisturbed one does."""

import os
import random
import re
import signal
import statistics
import time

import pytest

from rayrlhf.observe.journal import read_journal
from rayrlhf.observe.samples import read_samples
from tests.chaos.arena import Job, repeatable

STEPS = 14
SETTINGS = [
    "rollout.backend=transformers",
    "rollout.replicas=2",
    "rollout.prompts_per_step=32",
    "rollout.max_new_tokens=24",
    "placement.policy.ranks=2",
    "run.determinism=exact",
    "checkpoint.every=3",
    "observe.samples_per_step=32",
    "evaluation.enabled=false",
    "recovery.snapshot=step",
    "recovery.ping_every=1",
    "recovery.ping_deadline=8",
]
LONGEST_MEDIAN = {"rollout": 40, "policy": 45, "critic": 45}
"""Seconds on two cores."""
HURTS = [
    ("rollout", signal.SIGKILL),
    ("policy", signal.SIGKILL),
    ("reward", signal.SIGKILL),
    ("rollout", signal.SIGSTOP),
    ("critic", signal.SIGKILL),
    ("driver", signal.SIGKILL),
]


def run_pair(folder, steps, hurts, seconds, *overrides, seed=5):
    """The twin and the victim, one after the other; each hurt falls at a random moment of a step of its own."""
    generator = random.Random(seed)
    settings = [*SETTINGS, f"run.steps={steps}", *overrides]
    twin = Job(folder / "twin", *settings).start()
    assert twin.wait(seconds) == 0, twin.log[-3000:]
    victim = Job(folder / "victim", *settings).start()
    step_seconds = statistics.median(row["time/step"] for row in twin.steps())
    hurt = {}
    for index, (role, kind) in enumerate(hurts):
        if not victim.wait_for_step(1 + index * (steps - 2) // len(hurts), seconds):
            break
        time.sleep(generator.random() * step_seconds)
        hurt[role, kind] = victim.hurt(role, kind)
        if role == "driver" and victim.wait(60) != 0:
            victim.start()
    victim.hurt_processes = hurt
    code = victim.wait(seconds)
    return twin, victim, code


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return run_pair(tmp_path_factory.mktemp("chaos"), STEPS, HURTS, 240)


@pytest.mark.slow
def test_the_job_ends_by_itself_after_six_kills(pair):
    _, victim, code = pair
    assert code == 0, victim.log[-3000:]
    lost = {event["actor"].split("/")[-2] for event in read_journal(victim.folder) if event["event"] == "lost"}
    assert {"rollout", "policy", "critic", "reward"} <= lost
    assert os.environ.get("RAYRLHF_CHAOS_TABLE") is None or print_table(victim)


@pytest.mark.slow
def test_every_step_has_the_metrics_of_the_undisturbed_twin_bit_for_bit(pair):
    same_metrics(*pair[:2], STEPS)


def same_metrics(twin, victim, steps):
    assert [row["step"] for row in victim.steps()] == list(range(1, steps + 1))
    for mine, other in zip(victim.steps(), twin.steps(), strict=True):
        assert repeatable(mine) == repeatable(other)


@pytest.mark.slow
def test_no_prompt_is_lost_or_used_twice_and_no_failure_becomes_a_reward(pair):
    same_samples(*pair[:2], STEPS)


def same_samples(twin, victim, steps):
    keys = ("step", "prompt_id", "sample", "response", "score")
    mine, other = ([tuple(row[key] for key in keys) for row in read_samples(job.folder / "samples")] for job in (victim, twin))
    assert mine == other
    assert len(set(mine)) == len(mine) == steps * 32


@pytest.mark.slow
def test_a_stopped_replica_is_found_within_its_deadline_and_named_with_process_and_node(pair):
    _, victim, _ = pair
    hung = [event["reason"] for event in read_journal(victim.folder) if event["event"] == "hung"]
    assert len(hung) == 1
    process = victim.hurt_processes["rollout", signal.SIGSTOP]
    assert re.search(rf"ppo/rollout/\d \(process {process} on node ", hung[0])
    assert "no answer to a ping for 8 s; the process is ended" in hung[0]


def recovery_seconds(journal):
    """Seconds from loss to recovery by role."""
    table = {}
    for event in journal:
        if event["event"] in ("recovered", "replayed"):
            table.setdefault(event["actor"].split("/")[-2], []).append(event["seconds"])
    return table


def print_table(victim):
    for role, seconds in recovery_seconds(read_journal(victim.folder)).items():
        print(f"{role}: {len(seconds)} recoveries, median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s")
    return True


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("piece", [0, 1, 2])
def test_thirty_random_kills_in_three_runs_change_nothing(tmp_path, piece):
    """Ten a run, so that each takes less than nine minutes; `-s` shows the table of recovery times."""
    generator = random.Random(piece)
    roles = ["rollout", "rollout", "policy", "policy", "reward", "critic", "reference", "driver"]
    kinds = [signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]
    hurts = [(role, signal.SIGKILL if role == "driver" else generator.choice(kinds)) for role in generator.choices(roles, k=10)]
    steps = 2 * len(hurts) + 4
    twin, victim, code = run_pair(tmp_path, steps, hurts, 400, seed=piece)
    assert code == 0, victim.log[-3000:]
    same_metrics(twin, victim, steps)
    same_samples(twin, victim, steps)
    medians = {role: statistics.median(seconds) for role, seconds in recovery_seconds(read_journal(victim.folder)).items()}
    print_table(victim)
    hurt = {role for role, _ in hurts}
    assert all(medians[role] < longest for role, longest in LONGEST_MEDIAN.items() if role in hurt)
