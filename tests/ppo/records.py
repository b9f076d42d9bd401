"""A run folder with one recorded step, without models: rollouts, rewards and outputs of the models are made up."""

from dataclasses import replace

import numpy as np

from rayrlhf.config.loading.load import dump_config
from rayrlhf.data.records import Prompt, Rollout, SampleKey, TokenScores
from rayrlhf.data.seeds import sample_seed
from rayrlhf.engines.train.plan import UpdateReport
from rayrlhf.observe.flight_record import FOLDER, read_record, write_record
from rayrlhf.observe.metrics import MetricsSink
from rayrlhf.ppo.executed_step import ExecutedStep, to_record
from rayrlhf.ppo.experience import ExperienceMaker
from rayrlhf.ppo.model_updater import step_plan
from rayrlhf.ppo.scoring import ScoredRollouts
from rayrlhf.rewards.score import RewardBatch
from tests.ppo.runs import run_config

SETTINGS = ["rollout.prompts_per_step=8", "rollout.samples_per_prompt=2", "train.epochs=2", "reward.functions=[{name: length}]"]


def rollout(random, prompt, sample, tokens, **more):
    return Rollout(
        key=SampleKey(0, prompt, sample),
        prompt_ids=random.integers(3, 250, 12, dtype=np.int32),
        response_ids=random.integers(3, 250, tokens, dtype=np.int32),
        action_mask=np.ones(tokens, np.bool_),
        logprobs=-random.random(tokens, dtype=np.float32),
        versions=np.zeros(tokens, np.int32),
        finish_reason="stop" if sample else "length",
        text="text",
        seed=sample_seed(0, 0, prompt, sample),
        **more,
    )


def made_up(tokens=6, samples=16):
    """Scored rollouts of pairs of responses to a prompt, with outputs of policy, reference and critic."""
    random = np.random.default_rng(0)
    rollouts = [rollout(random, row // 2, row % 2, 1 + int(random.integers(tokens))) for row in range(samples)]
    first = {one.key.prompt: one.prompt_ids for one in reversed(rollouts)}
    rollouts = [replace(one, prompt_ids=first[one.key.prompt]) for one in rollouts]
    lengths = [len(one.response_ids) for one in rollouts]
    passes = {
        "policy": [TokenScores(logprobs=one.logprobs + np.float32(1e-6)) for one in rollouts],
        "reference": [TokenScores(logprobs=-random.random(length, dtype=np.float32)) for length in lengths],
        "critic": [TokenScores(values=random.random(length + 1, dtype=np.float32)) for length in lengths],
    }
    scores = np.array(lengths, np.float32)
    prompts = {one.key.prompt: Prompt(one.key.prompt, "", one.prompt_ids) for one in rollouts}
    return ScoredRollouts(tuple(rollouts), RewardBatch(scores, {"length": scores}), passes, prompts)


def executed(config, scored):
    """The step that a run would have executed; the results of its update are made up."""
    maker = ExperienceMaker(config)
    state, experience = maker.state_dict(), maker.make(scored)
    metrics = [{"loss/policy_avg": 0.5}, {"loss/policy_avg": float("nan")}]
    report = UpdateReport({}, [1.0, 2.0], [1e-3, 1e-3], 2, 1, False, 0, 0, 1, 1, 0.0, 0.0, {}, metrics)
    weights = {"policy": {"embed": 1, "head": 2}}
    plan = step_plan(config, experience, 0)
    drawn, replicas = list(scored.prompts), {one.key: one.key.prompt % 2 for one in scored.rollouts}
    return ExecutedStep(
        1, 0, drawn, replicas, state, scored, experience, plan, {"policy": report}, weights, weights, experience.metrics
    )


def recorded_run(folder, *overrides, level="full", scored=None):
    """Write the run folder; returns the configuration and the executed step."""
    config = run_config(folder, *SETTINGS, *overrides)
    step = executed(config, scored or made_up())
    records = config.run.folder / FOLDER
    records.mkdir(parents=True)
    (config.run.folder / "config.yaml").write_text(dump_config(config))
    sink = MetricsSink(config.run.folder)
    sink.write(1, {**step.metrics, "episode": 16.0})
    sink.close()
    write_record(records, to_record(step, level))
    return config, step


def rewrite(config, step=1, header=None, **columns):
    """Plant a fault: replace columns (a function of the old ones) or parts of the header."""
    record = read_record(config.run.folder / FOLDER, step)
    changed = {name.replace("__", "/"): change(record.columns[name.replace("__", "/")]) for name, change in columns.items()}
    new = replace(record, columns={**record.columns, **changed}, header={**record.header, **(header or {})})
    write_record(config.run.folder / FOLDER, new)
