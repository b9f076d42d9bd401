"""The parts around the loop: tables, the file that is followed, resources, refusals, the best checkpoint, and chance."""

import json
import shutil

import numpy as np
import pytest
from ray.exceptions import RayActorError

from rayrlhf.actors.placement import ClusterResources
from rayrlhf.config.loading.load import dump_config, load_config
from rayrlhf.config.tuning import SFTConfig, TuningCheckpointSection, WorkersSection
from rayrlhf.data.supervised.datasets import PreferencePair, SupervisedSample
from rayrlhf.errors import ActorLostError, AlarmError, UserError
from rayrlhf.observe.journal import read_journal
from rayrlhf.tuning.data_plan import STATE_FILE, best_step, checkpoint_name
from rayrlhf.tuning.export import check_better_than_chance
from rayrlhf.tuning.follow import Follower
from rayrlhf.tuning.held_out import PreferenceScores
from rayrlhf.tuning.merge import exported_model
from rayrlhf.tuning.ray_train import checkpoint_config, worker_resources
from rayrlhf.tuning.refusal import has_refusal, raise_refusal, write_refusal
from rayrlhf.tuning.sample_table import PairTable, SampleTable
from rayrlhf.tuning.train_model import _differences, _lost, check_reward, check_sft, fit_again
from rayrlhf.tuning.training_result import TuningResult, read_result
from tests.models.families import write_family
from tests.tuning.runs import reward_config, sft_config


def samples(count):
    generator = np.random.default_rng(0)
    made = []
    for row in range(count):
        ids = generator.integers(0, 9, generator.integers(2, 7)).astype(np.int32)
        made.append(SupervisedSample(ids, ids > 4, 10 + row))
    return made


def same(one, other):
    return (one.token_ids == other.token_ids).all() and (one.loss_mask == other.loss_mask).all() and one.row == other.row


def test_a_table_gives_samples_back_as_they_were():
    given = samples(5)
    table = SampleTable.of(given)
    assert len(table) == 5
    assert table.lengths == [len(sample.token_ids) for sample in given]
    assert all(same(*both) for both in zip(table.take([3, 0]), [given[3], given[0]], strict=True))


def test_a_table_gives_pairs_back_with_their_margins():
    answers = samples(6)
    pairs = [PreferencePair(answers[2 * i], answers[2 * i + 1], [0.5, None, -1.0][i], 10 + 2 * i) for i in range(3)]
    found = PairTable.of(pairs).take([2, 1])
    assert [pair.margin for pair in found] == [-1.0, None]
    assert same(found[0].chosen, answers[4])
    assert same(found[1].rejected, answers[3])
    assert [pair.row for pair in found] == [14, 12]


def test_a_file_is_followed_line_by_line_and_again_after_it_was_rewound(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.rows() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert follower.rows() == [{"step": 1}, {"step": 2}]
    assert follower.rows() == []
    path.write_text("")
    assert follower.rows() == follower.rows() == []
    path.write_text('{"step": 1}\n')
    assert follower.rows() == [{"step": 1}]


@pytest.mark.parametrize(
    ("settings", "machine", "expected"),
    [
        ({}, ClusterResources((2.0,), (0.0,)), (2.0, 0.0, 2)),
        ({"count": 2}, ClusterResources((2.0,), (0.0,)), (1.0, 0.0, 1)),
        ({"count": (1, 4)}, ClusterResources((2.0,), (0.0,)), (0.5, 0.0, 1)),
        ({"count": 2, "cpus": 4.0, "threads": 3}, ClusterResources((8.0, 8.0), (1.0, 1.0)), (4.0, 1.0, 3)),
        ({"count": 2}, ClusterResources((8.0,), (1.0,)), (4.0, 0.0, 4)),
    ],
)
def test_what_a_worker_asks_for_follows_from_the_machine(settings, machine, expected):
    found = worker_resources(WorkersSection(**settings), machine)
    assert (found.cpus, found.gpus, found.threads) == expected


def test_more_workers_than_fit_are_refused_before_anything_waits_for_them():
    with pytest.raises(UserError, match=r"2 x 2 cpus requested, but the cluster's nodes have 3, 1"):
        worker_resources(WorkersSection(count=2, cpus=2.0), ClusterResources((3.0, 1.0), (0.0, 0.0)))


def test_a_refusal_reaches_the_driver_as_the_error_it_was(tmp_path):
    raise_refusal(tmp_path)
    write_refusal(tmp_path, AlarmError("no better than chance"))
    assert has_refusal(tmp_path)
    with pytest.raises(AlarmError, match="no better than chance"):
        raise_refusal(tmp_path)
    assert not has_refusal(tmp_path)


def test_the_best_checkpoint_is_one_that_is_still_there(tmp_path):
    rows = [(2, 3.0), (4, 1.0), (6, 2.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "evaluation/loss": v}) + "\n" for s, v in rows))
    for step in (2, 6):
        folder = tmp_path / "checkpoints" / "train" / checkpoint_name(step)
        folder.mkdir(parents=True)
        (folder / STATE_FILE).write_text("{}")
    assert best_step("loss", tmp_path) == 6
    assert best_step(None, tmp_path) is None


@pytest.mark.parametrize(("metric", "order"), [("loss", "min"), ("accuracy", "max")])
def test_ray_train_keeps_the_best_by_the_metric_that_is_asked_for(metric, order):
    found = checkpoint_config(TuningCheckpointSection(best_metric=metric, keep=3))
    assert (found.num_to_keep, found.checkpoint_score_attribute) == (3, f"evaluation/{metric}")
    assert found.checkpoint_score_order == order


def test_a_result_is_found_again_where_its_folder_was_moved_to(tmp_path):
    (tmp_path / "old").mkdir()
    TuningResult(tmp_path / "old", tmp_path / "old" / "export", 6, {"loss": 1.5}, 2.0).write()
    (tmp_path / "old").rename(tmp_path / "new")
    found = read_result(tmp_path / "new")
    assert (found.export, found.steps, found.metrics) == (tmp_path / "new" / "export", 6, {"loss": 1.5})
    assert read_result(tmp_path) is None


def test_statistics_of_held_out_rewards_are_those_of_all_answers():
    scores = PreferenceScores(*(np.array(part, dtype=np.float32) for part in ([1.0, 3.0], [0.0, 4.0], [0.0, 0.0])))
    assert (scores.mean, scores.std) == pytest.approx((2.0, np.std([0, 1, 3, 4])))
    assert scores.metrics()["evaluation/accuracy"] == 0.5


@pytest.mark.parametrize(("correct", "refused"), [(30, True), (40, False)])
def test_a_model_that_coins_could_replace_is_refused_unless_told_otherwise(correct, refused):
    chosen = np.where(np.arange(60) < correct, 1.0, -1.0).astype(np.float32)
    scores = PreferenceScores(chosen, np.zeros(60, np.float32), np.zeros(60, np.float32))
    check_better_than_chance(scores, anyway=True)
    if refused:
        with pytest.raises(AlarmError, match="in 30 of 60 held-out pairs"):
            check_better_than_chance(scores, anyway=False)
    else:
        check_better_than_chance(scores, anyway=False)


def test_a_folder_without_a_model_and_a_model_without_adapters_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="expected the folder of a finished run"):
        exported_model(tmp_path, merge=False)
    (tmp_path / "export").mkdir()
    assert exported_model(tmp_path, merge=False) == tmp_path / "export"
    with pytest.raises(UserError, match="a whole model without adapters"):
        exported_model(tmp_path, merge=True)


def test_samples_longer_than_the_model_are_found_before_it_is_loaded(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "a" * 200}) + "\n")
    settings = ["model.path=builtin:tiny?context=128", f"data.train.path={path}", f"run.root={tmp_path}"]
    with pytest.raises(UserError, match="a sample has 201 tokens, the model 128 positions"):
        check_sft(load_config(SFTConfig, None, settings))


@pytest.mark.parametrize(
    ("setting", "may_change"),
    [
        ("workers.count=2", True),
        ("data.reader=ray", True),
        ("observe.tensorboard=true", True),
        ("checkpoint.keep=5", True),
        ("train.learning_rate=0.5", False),
        ("data.max_length=77", False),
        ("run.seed=9", False),
    ],
)
def test_only_what_changes_no_number_of_the_training_may_change_in_a_run(tmp_path, setting, may_change):
    stored, wanted = (dump_config(sft_config(tmp_path, *settings)) for settings in ((), (setting,)))
    assert stored != wanted
    differing = _differences(SFTConfig, stored, wanted)
    assert (differing == []) == may_change
    assert may_change or differing[0].startswith(setting.partition("=")[0])


def test_a_token_that_the_model_has_no_row_for_is_found_in_a_dry_run(tmp_path):
    from rayrlhf.models.builtin import resolve_model
    from rayrlhf.models.tiny import byte_tokenizer

    model = shutil.copytree(resolve_model("builtin:tiny?layers=1&hidden=64"), tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|new0|>", "<|new1|>"]})
    tokenizer.save_pretrained(model)
    check_sft(sft_config(tmp_path, f"model.path={model}"))  # none of the texts has the new tokens
    template = tmp_path / "new.jinja"
    template.write_text("{% for m in messages %}<|new1|>{{ m['content'] }}<|im_end|>{% endfor %}")
    with pytest.raises(UserError, match=r"its tokenizer writes '<\|new1\|>' as token 260, expected at most 258"):
        check_sft(sft_config(tmp_path, f"model.path={model}", f"model.chat_template={template}"))


def test_a_reward_run_that_could_not_be_exported_is_refused_in_a_dry_run(tmp_path):
    model = write_family("granite", tmp_path / "granite")
    with pytest.raises(UserError, match="a granite model cannot become a reward model"):
        check_reward(reward_config(tmp_path, f"model.path={model}"))


@pytest.mark.parametrize(("losses", "times"), [(3, 2), (1, 2), (0, 1)])
def test_a_lost_controller_is_started_again_a_bounded_number_of_times(tmp_path, losses, times):
    tries = []

    def fit():
        tries.append(1)
        if len(tries) <= times:
            raise RayActorError(error_msg="the actor died")

    if losses < times:
        with pytest.raises(
            ActorLostError, match=rf"sft/controller was lost, after {losses} recoveries: .*same command goes on"
        ):
            fit_again(fit, tmp_path, "sft/controller", losses)
    else:
        fit_again(fit, tmp_path, "sft/controller", losses)
    assert len(tries) == min(times, losses) + 1
    assert [event["actor"] for event in read_journal(tmp_path)] == ["sft/controller"] * min(times, losses)


def test_a_controller_that_found_the_disk_full_is_no_lost_worker():
    from ray.train import ControllerError

    found = _lost(ControllerError(OSError(28, "No space left on device", "snapshot.json")), 3)
    assert isinstance(found, UserError)
    assert str(found).startswith("training: No space left on device (snapshot.json); free some space")


def test_a_followed_file_that_was_rewound_and_grew_again_is_read_from_its_start(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "loss": 3.5}\n')
    follower = Follower(path)
    assert [row["step"] for row in follower.rows()] == [1, 2]
    path.write_text('{"step": 1}\n{"step": 2, "evaluation/loss": 3.25}\n{"step": 3')
    assert [row["step"] for row in follower.rows()] == [1, 2]
    path.write_text('{"step": 1}\n{"step": 2, "evaluation/loss": 3.25}\n{"step": 3}\n')
    assert [row["step"] for row in follower.rows()] == [3]
