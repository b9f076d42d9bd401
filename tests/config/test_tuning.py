"""SFT and reward configurations: minimal files, defaults, checks that span sections, and the plan in words."""

import pytest

from rayrlhf.config.loading.describe import describe_tuning
from rayrlhf.config.loading.load import dump_config, load_config
from rayrlhf.config.train import TrainSection
from rayrlhf.config.tuning import RewardTrainingConfig, SFTConfig
from rayrlhf.errors import UserError

ROOTS = [SFTConfig, RewardTrainingConfig]
BASE = ["model.path=builtin:tiny", "data.train.path=rows.jsonl"]


def load(root, *overrides):
    return load_config(root, None, [*BASE, *overrides])


def error_of(root, *overrides):
    with pytest.raises(UserError) as caught:
        load(root, *overrides)
    return str(caught.value)


def plan(root, *overrides):
    return describe_tuning(load(root, *overrides)).splitlines()


@pytest.mark.parametrize("root", ROOTS)
def test_defaults_are_valid_and_a_dumped_configuration_is_the_same(root, tmp_path):
    path = tmp_path / "config.yaml"
    for overrides in ([], ["workers.count=[1, 3]", "train.batch_tokens=90000", "data.evaluation.path=e.jsonl"]):
        config = load(root, *overrides)
        path.write_text(dump_config(config))
        assert load_config(root, path) == config


def test_runs_have_names_of_their_own():
    assert [load(root).run.folder.name for root in ROOTS] == ["sft", "reward"]


@pytest.mark.parametrize(
    ("overrides", "samples"), [([], 32), (["train.batch_size=4"], 4), (["train.batch_tokens=99999"], None)]
)
def test_a_step_has_one_size(overrides, samples):
    assert load(SFTConfig, *overrides).train.samples_per_step == samples


@pytest.mark.parametrize(("count", "fewest", "most"), [("3", 3, 3), ("[1, 4]", 1, 4)])
def test_workers_are_a_number_or_a_range(count, fewest, most):
    workers = load(SFTConfig, f"workers.count={count}").workers
    assert (workers.fewest, workers.most) == (fewest, most)


def test_pairs_are_held_out_unless_said_otherwise_and_samples_are_not():
    assert [load(root).data.held_out_share for root in ROOTS] == [0.0, 0.1]
    assert [load(root, "data.evaluation_share=0.25").data.held_out_share for root in ROOTS] == [0.25, 0.25]
    assert [load(root, "data.evaluation.path=e.jsonl").data.held_out_share for root in ROOTS] == [0.0, 0.0]
    assert [load(root).has_evaluation for root in ROOTS] == [False, True]


def test_the_engine_gets_what_was_set_and_takes_one_step_a_batch():
    overrides = {
        "learning_rate": 0.5,
        "micro_batch_size": 3,
        "micro_batch_tokens": 77,
        "max_grad_norm": 2.5,
        "zero_stage": 2,
        "offload_optimizer": True,
        "share_prefixes": "off",
        "router_aux_loss_coefficient": 0.25,
    }
    text = [f"train.{name}={str(value).lower()}" for name, value in overrides.items()]
    train = load(SFTConfig, *text, "train.epochs=9", "train.optimizer.name=sgd", "train.schedule.shape=cosine").train
    engine = train.engine_section()
    assert {name: getattr(engine, name) for name in overrides} == overrides
    assert (engine.epochs, engine.mini_batch_size) == (1, None)
    assert (engine.optimizer.name, engine.schedule.shape) == ("sgd", "cosine")
    shared = set(TrainSection.model_fields) & set(type(train).model_fields)
    assert shared == {*overrides, "optimizer", "schedule", "epochs"}


@pytest.mark.parametrize(
    ("root", "overrides", "message"),
    [
        (SFTConfig, ["train.bach_size=1"], "train.bach_size: unknown key; did you mean train.batch_size?"),
        (SFTConfig, ["data.train.chosen_field=a"], "data.train.chosen_field: unknown key"),
        (RewardTrainingConfig, ["train.neftune_alpha=5"], "train.neftune_alpha: unknown key"),
        (SFTConfig, ["data.loss_on=answer"], "data.loss_on: expected 'auto', 'all', 'completion' or 'assistant'"),
        (SFTConfig, ["data.evaluation_share=1"], "data.evaluation_share: expected < 1"),
        (SFTConfig, ["data.evaluation_share=0.1", "data.evaluation.path=e"], "evaluation and evaluation_share are both given"),
        (SFTConfig, ["train.batch_size=1", "train.batch_tokens=9"], "batch_size and batch_tokens are both given"),
        (SFTConfig, ["train.packing=true", "train.micro_batch_size=2"], "micro_batch_size has no effect with packing"),
        (SFTConfig, ["train.offload_optimizer=true"], "offload_optimizer needs zero_stage 1, 2 or 3"),
        (SFTConfig, ["workers.count=0"], "workers.count: expected >= 1"),
        (SFTConfig, ["workers.count=[3, 2]"], "count: expected [fewest, most], found [3, 2]"),
        (SFTConfig, ["workers.count=4", "train.batch_size=3"], "train.batch_size 3 is smaller than workers.count 4"),
        (SFTConfig, ["workers={count: 3, sequence_parallel: 2}"], "sequence_parallel 2 does not divide count 3"),
        (SFTConfig, ["workers={count: [2, 4], sequence_parallel: 2}"], "sequence_parallel 2 needs one number as count"),
        (
            SFTConfig,
            ["workers={count: 4, sequence_parallel: 2}", "train.batch_size=1"],
            "train.batch_size 1 is smaller than workers.count 4 / sequence_parallel 2",
        ),
        (SFTConfig, ["train.batch_tokens=1000"], "train.batch_tokens 1000 cannot hold data.max_length 1024"),
        (
            RewardTrainingConfig,
            ["train.batch_tokens=2000"],
            "train.batch_tokens 2000 cannot hold data.max_length 1024 for chosen and rejected",
        ),
        (SFTConfig, ["train.packing=true", "train.micro_batch_tokens=1000"], "cannot hold data.max_length 1024"),
        (SFTConfig, ["evaluation.every=5"], "evaluation.every 5 needs held-out rows: set data.evaluation or"),
        (SFTConfig, ["checkpoint.best_metric=accuracy"], "checkpoint.best_metric: expected 'loss', found \"accuracy\""),
        (SFTConfig, ["checkpoint.best_metric=loss"], "checkpoint.best_metric loss needs held-out rows"),
    ],
)
def test_a_mistake_is_one_line(root, overrides, message):
    found = error_of(root, *overrides)
    assert message in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("root", "overrides", "expected"),
    [
        (
            SFTConfig,
            ["train.epochs=2", "train.neftune_alpha=5", "model.lora.rank=8", "data.evaluation_share=0.1"],
            [
                "run: runs/sft, 2 epochs, seed 0",
                "policy: builtin:tiny, LoRA rank 8, 1 worker, ZeRO stage 0",
                "loss: cross-entropy per token to learn (auto), NEFTune noise 5",
                "data: samples of rows.jsonl, at most 1024 tokens, longer ones are an error",
                "held out: 10 % of the training rows",
                "an optimizer step: 32 samples over all workers",
                "micro-batches: at most 4096 tokens with padding",
                "evaluation: all that is held out, before and after",
                "checkpoints: every 50 steps and at the end, the last 2 kept",
                "export: the last weights",
            ],
        ),
        (
            RewardTrainingConfig,
            [
                "train.steps=7",
                "train.center_coefficient=0.01",
                "train.packing=true",
                "data.train.group_field=question",
                "workers.count=[1, 2]",
                "checkpoint.best_metric=accuracy",
                "evaluation.every=3",
                "evaluation.rows=9",
                "checkpoint.every=0",
            ],
            [
                "run: runs/reward, 7 steps, seed 0",
                "reward model: builtin:tiny, 1 to 2 workers, ZeRO stage 0",
                "loss: Bradley-Terry per pair + 0.01 x (chosen + rejected)^2",
                "held out: 10 % of the training rows, whole groups of question",
                "an optimizer step: 32 pairs over all workers",
                "micro-batches: packs of at most 4096 tokens, without padding",
                "evaluation: the first 9 of what is held out, before, every 3 steps and after",
                "checkpoints: at the end, the last 2 kept",
                "export: the best by held-out accuracy, unless not better than chance",
            ],
        ),
        (RewardTrainingConfig, ["export_anyway=true"], ["export: the last weights"]),
        (SFTConfig, [], ["skipped: evaluation, because neither data.evaluation nor data.evaluation_share is given"]),
        (SFTConfig, ["train.batch_tokens=9999"], ["an optimizer step: at most 9999 tokens over all workers"]),
        (SFTConfig, ["train.micro_batch_size=1"], ["micro-batches: 1 sample"]),
        (
            SFTConfig,
            ["data.evaluation.path=e.jsonl", "evaluation.generations=0"],
            ["held out: e.jsonl", "skipped: sampled answers, because evaluation.generations is 0"],
        ),
    ],
)
def test_the_plan_says_what_a_run_will_do(root, overrides, expected):
    assert set(expected) <= set(plan(root, *overrides))
