"""Replicas join and leave a running job; a wish that cannot be is one line."""

import time
from types import SimpleNamespace

import pytest
import ray

from rayrlhf.config.loading.load import dump_config
from rayrlhf.errors import UserError
from rayrlhf.observe.journal import read_journal
from rayrlhf.observe.run_folder import open_run
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.replica_scaling import want_replicas, wanted_replicas
from rayrlhf.ppo.run_identity import stored_differences
from rayrlhf.ppo.run_loop import RunLoop
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config


@pytest.fixture
def run(tmp_path):
    def make(*overrides):
        config = run_config(tmp_path, *overrides)
        return open_run(config.run.folder, dump_config(config), lambda *_: [])

    return make


def test_a_wish_is_read_back_and_the_last_one_counts(run):
    with run() as folder:
        assert wanted_replicas(folder.path, print) is None
        want_replicas(folder.path, 3)
        want_replicas(folder.path, 2)
        assert wanted_replicas(folder.path, print) == 2


@pytest.mark.parametrize(
    "text", ["", '{"rollout": ', '{"rollout": 0}', '{"rollout": "two"}', "[2]", '{"rolloup": 2}', "\x00" * 9]
)
def test_a_damaged_wish_is_dropped_with_one_line(tmp_path, text):
    (tmp_path / "wanted.json").write_text(text)
    lines = []
    assert wanted_replicas(tmp_path, lines.append) is None
    assert wanted_replicas(tmp_path, lines.append) is None
    (line,) = lines
    assert "wanted.json is damaged" in line


def test_a_replica_on_another_gpu_does_not_join_where_weights_go_by_ipc():
    notes = []
    plan = SimpleNamespace(workers={"rollout": (None, None)})
    groups = SimpleNamespace(plan=plan, specs=SimpleNamespace(weight_transfer="ipc"))
    recorder = SimpleNamespace(note=notes.append)
    loop = SimpleNamespace(_driver=SimpleNamespace(actor_groups=groups), _recorder=recorder, _told_unreachable=False)
    assert [RunLoop._reachable(loop, count) for count in (1, 2, 3, 3)] == [1, 2, 2, 2]
    assert ["3 replicas are wanted" in note for note in notes] == [True]
    groups.specs.weight_transfer = "nccl"
    assert RunLoop._reachable(loop, 3) == 3


@pytest.mark.parametrize("text", ["", "run: [", "- 1", "run: {}\nrollout: {}", "\x00" * 9])
def test_a_damaged_configuration_of_a_run_is_one_line(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        want_replicas(tmp_path, 2)
    with pytest.raises(UserError, match=r"config\.yaml is damaged .*restore it, or choose another run\.name"):
        open_run(tmp_path, dump_config(run_config(tmp_path)), stored_differences)


def test_what_cannot_be_is_refused_in_one_line(run, tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        want_replicas(tmp_path, 2)
    with run("recovery.min_replicas=2", "rollout.replicas=2") as folder, pytest.raises(UserError, match="at least 2"):
        want_replicas(folder.path, 1)
    with pytest.raises(UserError, match=r"no running driver; start it with rollout\.replicas=4"):
        want_replicas(folder.path, 4)
    with run("run.determinism=exact", "run.name=other") as folder, pytest.raises(UserError, match="fixes the number"):
        want_replicas(folder.path, 2)


class Scale(Callback):
    """Wants three replicas after step 1, one again once all of them have served, and the end once they have left."""

    def __init__(self, folder):
        self.folder = folder
        self.served = []

    def on_start(self, trainer):
        self.trainer = trainer

    def on_step_end(self, step, metrics, scored):
        pool = self.trainer.fault_tolerance.pool
        self.served.append(len(pool.serving))
        if step == 1:
            want_replicas(self.folder, 3)
        elif len(pool.serving) == 3 and wanted_replicas(self.folder, print) == 3:
            want_replicas(self.folder, 1)
        elif len(pool.replicas) > 1 or wanted_replicas(self.folder, print) == 3:
            time.sleep(0.5)
        elif 3 in self.served:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_replicas_join_a_running_job_serve_its_weights_and_leave_again(tmp_path):
    workers = [f"placement.{role}.cpus=0.5" for role in ("policy", "critic", "reference", "reward")]
    settings = ["rollout.backend=transformers", "evaluation.enabled=false", "run.steps=50", "placement.rollout_cpus=1"]
    config = run_config(tmp_path, *settings, *workers)
    ray.init(num_cpus=5, include_dashboard=False, log_to_driver=False)
    try:
        scale = Scale(config.run.folder)
        with pytest.raises(KeyboardInterrupt):
            train_ppo(config, [scale])
        assert scale.served[0] == 1
        assert 3 in scale.served
        assert scale.served[-1] == 1
        changes = [event for event in read_journal(config.run.folder) if event["event"] in ("joined", "left")]
        assert sorted((event["event"], event["actor"]) for event in changes) == [
            (kind, f"ppo/rollout/{rank}") for kind in ("joined", "left") for rank in (1, 2)
        ]
        end = time.monotonic() + 20
        while ray.available_resources().get("CPU") != 5 and time.monotonic() < end:
            time.sleep(0.5)
        assert ray.available_resources()["CPU"] == 5  # every room is given back
    finally:
        ray.shutdown()
