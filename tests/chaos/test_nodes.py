"""Harm that comes from outside the processes: nodes, drivers, the network, memory, and rewards that take for ever.

Every job runs on a standing cluster of a head and two nodes. Each nightly piece takes less than nine minutes on two cores.
"""

import json
import random
import re
import signal

import psutil
import pytest

from rayrlhf.observe.journal import read_journal
from tests.chaos.arena import PLACED, Job, StandingCluster, nothing_left
from tests.chaos.duel import SETTINGS, print_table, run_pair, same_metrics, same_samples

KINDS = [
    ("node", "rollout"),
    ("node", "train"),
    ("rollout", signal.SIGKILL),
    ("critic", signal.SIGKILL),
    ("driver", signal.SIGKILL),
    ("policy", signal.SIGSTOP),
]
MORE_KINDS = [
    *KINDS,
    ("rollout", signal.SIGKILL),
    ("rollout", signal.SIGSTOP),
    ("policy", signal.SIGKILL),
    ("reference", signal.SIGKILL),
    ("reward", signal.SIGKILL),
]
FREE_MEMORY = 3 * 2**30


@pytest.mark.nightly
@pytest.mark.timeout(560)
@pytest.mark.parametrize("piece", [0, 1])
def test_lost_nodes_drivers_and_processes_of_every_role_change_nothing_and_leave_nothing(tmp_path, cluster, piece):
    hurts = random.Random(piece).sample(KINDS, len(KINDS))
    steps = 2 * len(hurts) + 3
    twin, victim, code = run_pair(tmp_path, steps, hurts, 240, *PLACED, seed=piece, cluster=cluster)
    print_table(victim)
    assert code == 0, victim.log[-3000:]
    same_metrics(twin, victim, steps)
    same_samples(twin, victim, steps)
    assert nothing_left(cluster)


@pytest.mark.nightly
@pytest.mark.timeout(2400)
def test_thirty_random_harms_in_one_job_on_two_nodes_change_nothing_and_leave_nothing(tmp_path, cluster):
    """About ten minutes on two cores; `-s` shows the table of recovery times."""
    generator = random.Random(30)
    hurts = [harm for _ in range(3) for harm in generator.sample(MORE_KINDS, 10)]
    steps = 2 * len(hurts) + 3
    twin, victim, code = run_pair(tmp_path, steps, hurts, 1800, *PLACED, seed=30, cluster=cluster)
    print_table(victim)
    assert code == 0, victim.log[-3000:]
    assert len(victim.hurts) == 30
    same_metrics(twin, victim, steps)
    same_samples(twin, victim, steps)
    assert nothing_left(cluster)


def harmed_pair(folder, cluster, harm, steps=6, *overrides):
    """The twin and a victim whose reward function does harm; the same run but for that."""
    jobs = []
    for name, kind in (("twin", "none"), ("victim", harm)):
        arguments = f"{{folder: {folder / name / 'calls'}, harm: {kind}}}"
        function = f"reward={{probe: false, functions: [{{name: 'tests.chaos.harm:hindered', arguments: {arguments}}}]}}"
        job = Job(folder / name, *SETTINGS, *PLACED, f"run.steps={steps}", function, *overrides, cluster=cluster).start()
        assert job.wait(400) == 0, job.log[-3000:]
        jobs.append(job)
    same_metrics(*jobs, steps)
    same_samples(*jobs, steps)
    return jobs[1]


def rebuilt(job, role):
    """Reasons why processes of a role were lost, all of which came back."""
    journal = [event for event in read_journal(job.folder) if f"/{role}/" in event["actor"]]
    lost = [event["reason"] for event in journal if event["event"] == "lost"]
    assert len(lost) == sum(event["event"] == "recovered" for event in journal)
    return lost


@pytest.mark.nightly
@pytest.mark.timeout(560)
def test_a_reward_that_does_not_answer_is_ended_at_its_deadline_and_asked_again(tmp_path, cluster):
    victim = harmed_pair(tmp_path, cluster, "slow", 6, "deadlines.score=15")
    (reason,) = rebuilt(victim, "reward")
    assert re.search(r"reward: no response from ppo/reward/0 \(process \d+ on node [\d.]+\) within 15 s", reason)


@pytest.mark.nightly
@pytest.mark.timeout(560)
def test_a_process_that_takes_all_memory_is_ended_by_ray_and_its_work_is_done_again(tmp_path):
    memory = psutil.virtual_memory()
    if memory.available < 2 * FREE_MEMORY:
        pytest.skip("too little memory is free to let a process be ended for taking it")
    threshold = (memory.total - memory.available + FREE_MEMORY) / memory.total
    guarded = {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    cluster = StandingCluster(**guarded)
    try:
        victim = harmed_pair(tmp_path, cluster, "memory")
    finally:
        cluster.end()
    assert any("memory" in reason.lower() for reason in rebuilt(victim, "reward"))


@pytest.mark.nightly
@pytest.mark.timeout(560)
def test_calls_that_the_network_loses_are_made_again_and_count_once(tmp_path):
    """Ray drops requests and replies of calls between processes, two in a hundred, up to four a process."""
    chance = {"num_failures": 4, "req_failure_prob": 1, "resp_failure_prob": 1}
    drops = json.dumps({"CoreWorkerService.grpc_client.PushTask": chance})
    steady = StandingCluster()
    steps = 8
    try:
        twin = Job(tmp_path / "twin", *SETTINGS, *PLACED, f"run.steps={steps}", cluster=steady).start()
        assert twin.wait(400) == 0, twin.log[-3000:]
    finally:
        steady.end()
    cluster = StandingCluster(RAY_testing_rpc_failure=drops)
    try:
        victim = Job(tmp_path / "victim", *SETTINGS, *PLACED, f"run.steps={steps}", cluster=cluster)
        starts = 1
        # What is lost while the processes are started ends the driver; the same command resumes, as everywhere.
        while victim.start().wait(300) != 0 and starts < 4:
            starts += 1
        assert victim.driver.returncode == 0, victim.log[-3000:]
    finally:
        cluster.end()
    print(f"{starts} starts, {[event['event'] for event in read_journal(victim.folder)]}")
    same_metrics(twin, victim, steps)
    same_samples(twin, victim, steps)
    assert starts > 1 or any(event["event"] == "lost" for event in read_journal(victim.folder))
