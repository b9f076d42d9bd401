"""Processes of every role are killed or stopped in the middle of a real job; it ends by itself, as the undisturbed one does."""

import os
import random
import re
import signal
import statistics

import pytest

from rayrlhf.observe.journal import read_journal
from tests.chaos.arena import reads_stacks
from tests.chaos.duel import Hurt, healing_seconds, print_table, recovery_seconds, run_pair, same_metrics, same_samples

STEPS = 14
TWO_POLICIES = "placement.policy.ranks=2"
LONGEST_MEDIAN = {"rollout": 40, "policy": 45, "critic": 45}
"""Seconds on two cores."""
HURTS = [
    ("rollout", signal.SIGKILL),
    ("policy", signal.SIGKILL),
    ("reward", signal.SIGKILL),
    ("rollout", signal.SIGSTOP),
    ("critic", signal.SIGKILL),
    ("driver", signal.SIGKILL),
    ("driver", signal.SIGTERM),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return run_pair(tmp_path_factory.mktemp("chaos"), STEPS, HURTS, 240, TWO_POLICIES)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_job_ends_by_itself_after_six_kills_and_a_stop(pair):
    _, victim, code = pair
    assert code == 0, victim.log[-3000:]
    lost = {event["actor"].split("/")[-2] for event in read_journal(victim.folder) if event["event"] == "lost"}
    assert {"rollout", "policy", "critic", "reward"} <= lost
    assert os.environ.get("RAYRLHF_CHAOS_TABLE") is None or print_table(victim)


@pytest.mark.slow
def test_every_step_has_the_metrics_of_the_undisturbed_twin_bit_for_bit(pair):
    same_metrics(*pair[:2], STEPS)


@pytest.mark.slow
def test_no_prompt_is_lost_or_used_twice_and_no_failure_becomes_a_reward(pair):
    same_samples(*pair[:2], STEPS)


@pytest.mark.slow
def test_a_stopped_replica_is_found_within_its_deadline_and_named_with_process_and_node(pair):
    _, victim, _ = pair
    hung = [event["reason"] for event in read_journal(victim.folder) if event["event"] == "hung"]
    assert len(hung) == 1
    process = next(hurt.process for hurt in victim.hurts if hurt.kind == "SIGSTOP")
    assert re.search(rf"ppo/rollout/\d \(process {process} on node ", hung[0])
    assert re.search(
        r"no response to a ping for 8 s; (the run waits for [a-z ]+ called \d+ s ago; )?the process is killed", hung[0]
    )
    if reads_stacks():
        (kept,) = (victim.folder / "stacks").glob("*rollout*.txt")
        assert f"Process {process}:" in kept.read_text()


@pytest.mark.slow
def test_sigterm_ends_the_driver_with_code_75_and_a_line_that_says_how_to_go_on(pair):
    _, victim, _ = pair
    assert victim.codes == [-signal.SIGKILL, 75]
    assert "on SIGTERM; the same command resumes" in victim.log


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
    twin, victim, code = run_pair(tmp_path, steps, hurts, 400, TWO_POLICIES, seed=piece)
    assert code == 0, victim.log[-3000:]
    same_metrics(twin, victim, steps)
    same_samples(twin, victim, steps)
    medians = {role: statistics.median(seconds) for role, seconds in recovery_seconds(read_journal(victim.folder)).items()}
    print_table(victim)
    hurt = {role for role, _ in hurts}
    assert all(medians[role] < longest for role, longest in LONGEST_MEDIAN.items() if role in hurt)


def test_healing_is_counted_from_each_harm_to_the_last_recovery_before_the_next():
    hurts = [Hurt("policy", "SIGKILL", 10.0, 1), Hurt("driver", "SIGKILL", 50.0, 2), Hurt("node", "lost", 90.0, "train")]
    journal = [
        {"event": "lost", "time": 11.0},
        {"event": "recovered", "time": 15.0},
        {"event": "replayed", "time": 22.0},
        {"event": "replayed", "time": 95.0},
    ]
    table = healing_seconds(hurts, journal, [5.0, 40.0, 70.0, 80.0, 99.0])
    assert table == {("policy", "SIGKILL"): [12.0], ("driver", "SIGKILL"): [20.0], ("node", "lost"): [5.0]}
