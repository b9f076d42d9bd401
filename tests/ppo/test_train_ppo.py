"""Whole PPO runs with real Ray actors, real DeepSpeed and real vLLM: all five roles, and what a run leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from ray.util.state import list_actors

from rayrlhf.errors import AlarmError, UserError
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.observe.samples import read_samples
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.run_recorder import read_evaluation
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config, tool_agent


class Watch(Callback):
    """Notes what `ray list actors` shows while the run goes, and every rollout's weight version."""

    def __init__(self):
        self.actors, self.versions = {}, []

    def on_start(self, trainer):
        # Filtered by Ray, which lists 100 actors, the dead of earlier tests among them.
        listed = list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "=", "ALIVE")])
        self.actors = {actor.name: actor.class_name for actor in listed if (actor.name or "").startswith("ppo/")}

    def on_step_end(self, step, metrics, scored):
        self.versions.append({int(version) for rollout in scored.rollouts for version in rollout.versions})


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory):
    """Two scalar-head models of the tiny family with heads of their own, saved as transformers saves reward models."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rayrlhf.models.builtin import resolve_model

    source = resolve_model("builtin:tiny?layers=1&hidden=64&seed=3")
    folders = [tmp_path_factory.mktemp("reward") / "model" for _ in range(2)]
    for folder in folders:
        AutoModelForSequenceClassification.from_pretrained(source, num_labels=1).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, reward_models):
    folder = tmp_path_factory.mktemp("run")
    one, other = reward_models
    ensemble = [f"reward.model.model.path={one}", f"reward.model.members=[{{path: {other}}}]", "reward.model.uncertainty=0.5"]
    config = run_config(folder, *ensemble, "reward.model.weight=0.01")
    watch = Watch()
    result = train_ppo(config, [watch])
    return config, result, watch


def test_ray_lists_all_five_roles_by_role_and_rank(finished_run):
    _, _, watch = finished_run
    assert watch.actors == {
        f"ppo/{role}/0": f"{role.title()}Actor" for role in ("policy", "critic", "reference", "reward", "rollout")
    }


def test_every_step_samples_with_the_weights_of_the_step_before(finished_run):
    _, _, watch = finished_run
    assert watch.versions == [{-1}, {1}]


def test_trainer_and_sampler_agree_on_fresh_rollouts_before_and_after_a_sync(finished_run):
    config, _, _ = finished_run
    gaps = [row["sampling/sampling_logp_difference/mean"] for row in read_metrics(config.run.folder) if "lr" in row]
    assert len(gaps) == 2
    assert max(gaps) < 1e-3


def test_the_first_update_starts_at_kl_0_and_moves_the_policy(finished_run):
    config, _, _ = finished_run
    first, second = (row for row in read_metrics(config.run.folder) if "lr" in row)
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert second["objective/kl"] != 0.0
    assert first["policy/grad_norm"] > 0
    assert first["critic/grad_norm"] > 0


def test_reward_functions_and_reward_models_are_both_in_the_score(finished_run):
    config, _, _ = finished_run
    rows = read_samples(config.run.folder / "samples")
    assert rows
    for row in rows:
        assert row["score"] == pytest.approx(row["reward/digit_share"] + 0.01 * row["reward/reward_model"], abs=1e-5)
        assert row["reward/reward_model_spread"] > 0


def test_a_run_leaves_metrics_samples_trace_checkpoint_and_a_model_that_transformers_loads(finished_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, result, _ = finished_run
    folder = config.run.folder
    assert {"config.yaml", "metrics.jsonl", "trace.json", "tensorboard", "samples", "evaluation", "checkpoints", "export"} <= {
        path.name for path in folder.iterdir()
    }
    models = json.loads((folder / "environment.json").read_text())["models"]
    assert set(models) >= {"policy", "reward"}
    assert models["policy"].startswith("llama, log-probs within 1e-06 nats of the model's own on 32 random tokens")
    assert len(read_evaluation(folder, 0)) == len(read_evaluation(folder, 2)) == 8
    assert result.peak_gib > 0
    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    assert AutoTokenizer.from_pretrained(folder / "export").chat_template
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_another_configuration_is_refused(finished_run):
    config, _, _ = finished_run
    other = config.model_copy(update={"rollout": config.rollout.model_copy(update={"temperature": 0.5})})
    with pytest.raises(UserError, match=r"rollout\.temperature: 1\.0 -> 0\.5"):
        train_ppo(other)


def test_nothing_of_a_run_is_left_alive(finished_run):
    assert not ray.is_initialized()
    leftovers = [process for process in psutil.Process().children(recursive=True) if "ray::" in process.name()]
    assert not leftovers


@pytest.mark.slow
def test_two_policy_ranks_with_a_shared_critic_and_adapters_run_without_vllm(tmp_path):
    config = run_config(
        tmp_path,
        "rollout.backend=transformers",
        "critic.kind=shared",
        "model.lora={rank: 4}",
        "placement.policy.ranks=2",
        "rollout.replicas=2",
        "run.steps=1",
    )
    watch = Watch()
    train_ppo(config, [watch])
    assert set(watch.actors) == {f"ppo/{name}" for name in ("policy/0", "policy/1", "reward/0", "rollout/0", "rollout/1")}
    (row,) = (row for row in read_metrics(config.run.folder) if "lr" in row)
    assert row["sampling/sampling_logp_difference/mean"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "with_tools"),
    [
        (["critic.kind=shared"], False),
        (["critic.kind=shared"], True),
        # Nothing is recomputed before the update, which then measures the gap.
        (["algorithm.advantage.estimator=grpo", "rollout.samples_per_prompt=2", "train.mini_batch_size=null"], False),
    ],
)
def test_a_sampler_that_does_not_serve_the_policy_stops_the_run(tmp_path, settings, with_tools):
    if with_tools:
        pytest.importorskip("vllm")
        settings = [*settings, *tool_agent("over_an_update", first=16, file="")]
    config = run_config(tmp_path, "rollout.backend=transformers", "algorithm.kl.coefficient=0", *settings)
    assert config.old_logprobs == ("recomputed" if config.critic.kind == "shared" else "skipped")

    class Sabotage(Callback):
        def on_start(self, trainer):
            handle = trainer.actor_groups["rollout"].handles[0]
            buckets = ray.get(list(trainer.actor_groups["policy"].handles[0].weights.remote(2**28, "float32")))
            wrong = [[item._replace(data=np.asarray(item.data) * 3) for item in bucket] for bucket in buckets]
            ray.get(handle.begin_weights.remote(0))
            for bucket in wrong:
                ray.get(handle.receive_weights.remote(bucket))
            ray.get(handle.finish_weights.remote())

    tight = config.model_copy(update={"rollout": config.rollout.model_copy(update={"mismatch_alarm": 1e-3})})
    with pytest.raises(AlarmError, match="does not serve the policy's weights"):
        train_ppo(tight, [Sabotage()])


PLUGINS = """
from pathlib import Path
from rayrlhf import Callback
from rayrlhf.engines.rollout.hf import TransformersRolloutEngine

class Engine(TransformersRolloutEngine):
    def __init__(self, spec, *, mark):
        super().__init__(spec)
        Path(mark).write_text("engine")

class Started(Callback):
    def __init__(self, mark):
        self.mark = Path(mark)

    def on_start(self, trainer):
        self.mark.write_text(self.mark.read_text() + " and callback")

def bad(responses):
    return [float('nan')] * len(responses)
"""


@pytest.mark.slow
def test_a_users_file_provides_engine_callback_and_reward_and_a_nan_reward_is_named_in_one_line(tmp_path):
    file, mark = tmp_path / "mine.py", tmp_path / "mark"
    file.write_text(PLUGINS)
    plugins = [
        f"rollout.backend={file}:Engine",
        f"rollout.arguments={{mark: '{mark}'}}",
        f"observe.callbacks=[{{name: '{file}:Started', arguments: {{mark: '{mark}'}}}}]",
        f"reward.functions=[{{name: '{file}:bad'}}]",
        "reward.probe=false",
    ]
    config = run_config(tmp_path, *plugins, "critic.kind=shared", "algorithm.kl.coefficient=0")
    with pytest.raises(UserError, match="reward function 'bad' returned float nan for sample 0"):
        train_ppo(config)
    assert mark.read_text() == "engine and callback"


def test_the_command_line_ends_a_users_mistake_with_one_line_and_exit_code_2(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {learnign_rate: 1}\n")
    command = [str(Path(sys.executable).with_name("rayrlhf")), "ppo", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2
    assert f"{path}: train.learnign_rate: unknown key; did you mean train.learning_rate?" in done.stderr
    assert "Traceback" not in done.stderr
