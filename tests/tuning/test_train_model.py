"""Whole runs on Ray Train: what they leave, what a rerun does, and that the number of workers changes nothing."""

import json

import numpy as np
import pytest

from rayrlhf.data.answer_format import AnswerFormat
from rayrlhf.engines.scoring.reward_model import STATISTICS_FILE
from rayrlhf.errors import AlarmError, UserError
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.observe.samples import read_samples
from rayrlhf.tuning.train_model import check_sft, train_reward, train_sft
from tests.models.families import write_family
from tests.tuning.runs import copied, reward_config, sft_config

CURVE_TOLERANCE = 1e-4

pytestmark = pytest.mark.usefixtures("cluster")


def losses(folder):
    return [row["loss"] for row in read_metrics(folder) if "loss" in row]


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory, cluster):
    folder = tmp_path_factory.mktemp("one")
    return sft_config(folder), train_sft(sft_config(folder))


def test_an_sft_run_learns_and_leaves_metrics_answers_checkpoints_and_a_model(one_worker):
    _, result = one_worker
    rows = read_metrics(result.folder)
    evaluations = [row["evaluation/loss"] for row in rows if "evaluation/loss" in row]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert losses(result.folder)[-1] < losses(result.folder)[0] - 0.5
    assert len(evaluations) == 2
    assert evaluations[-1] < evaluations[0] - 0.5
    assert result.metrics["evaluation/loss"] == evaluations[-1]
    assert {row["step"] for row in read_samples(result.folder / "samples")} == {0, 6}
    kept = sorted(path.name for path in (result.folder / "checkpoints" / "train").glob("step-*"))
    assert kept == ["step-000004", "step-000006"]
    (*_, newest) = (result.folder / "vitals.jsonl").read_text().splitlines()
    assert json.loads(newest)["resident_gib"] > 0.01
    models = json.loads((result.folder / "environment.json").read_text())["models"]
    assert models["model"].startswith("llama, log-probs within 1e-06 nats of the model's own")


@pytest.mark.nightly
def test_a_reward_model_has_the_loss_curve_of_its_twin_without_shared_prefixes(cluster, tmp_path):
    folders = []
    for share_prefixes in ("auto", "off"):
        name = f"run.name={share_prefixes}"
        folders.append(train_reward(reward_config(tmp_path, name, f"train.share_prefixes={share_prefixes}")).folder)
    np.testing.assert_allclose(losses(folders[0]), losses(folders[1]), rtol=0, atol=CURVE_TOLERANCE)
    assert all(row["tokens/shared_fraction"] > 0.3 for row in read_metrics(folders[0]) if "loss" in row)


def test_the_exported_model_has_the_held_out_loss_of_the_trained_one(one_worker):
    import torch
    from transformers import AutoModelForCausalLM

    from rayrlhf.data.supervised.datasets import load_supervised_data
    from rayrlhf.models.load import load_tokenizer

    config, result = one_worker
    model = AutoModelForCausalLM.from_pretrained(result.export, dtype=torch.float32)
    _, held_out = load_supervised_data(config.data, load_tokenizer(config.model))
    total = count = 0
    for sample in held_out.samples:
        with torch.no_grad():
            logits = model(torch.from_numpy(sample.token_ids.astype(np.int64))[None]).logits[0, :-1]
        targets = torch.from_numpy(sample.token_ids[1:].astype(np.int64))
        nats = torch.nn.functional.cross_entropy(logits, targets, reduction="none")[torch.from_numpy(sample.loss_mask[1:])]
        total, count = total + float(nats.sum()), count + len(nats)
    assert total / count == pytest.approx(result.metrics["evaluation/loss"], abs=1e-5)


def test_a_finished_run_is_not_run_again_and_another_configuration_is_refused(one_worker):
    config, result = one_worker
    before = (result.folder / "metrics.jsonl").read_bytes()
    again = train_sft(config)
    assert again.metrics == result.metrics
    assert (result.folder / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"train\.learning_rate"):
        train_sft(config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": 1.0})}))


@pytest.mark.slow
def test_a_finished_run_goes_on_when_its_steps_are_raised(one_worker, tmp_path):
    config = copied(one_worker[0], tmp_path)
    result = train_sft(config.model_copy(update={"train": config.train.model_copy(update={"steps": 7})}))
    rows = read_metrics(result.folder)
    assert result.steps == 7
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in rows if "evaluation/loss" in row] == [0, 6, 7]


@pytest.mark.nightly
def test_two_workers_and_packed_rows_have_the_loss_curve_of_one_worker(one_worker, tmp_path):
    _, alone = one_worker
    both = train_sft(sft_config(tmp_path, "workers.count=2", "train.packing=true", "train.micro_batch_tokens=256"))
    np.testing.assert_allclose(losses(both.folder), losses(alone.folder), rtol=0, atol=CURVE_TOLERANCE)
    assert both.metrics["evaluation/loss"] == pytest.approx(alone.metrics["evaluation/loss"], abs=CURVE_TOLERANCE)


@pytest.mark.slow
def test_workers_that_share_rows_take_the_steps_of_one(one_worker, tmp_path):
    _, alone = one_worker
    split = train_sft(sft_config(tmp_path, "workers={count: 2, sequence_parallel: 2, cpus: 1}", "train.zero_stage=3"))
    np.testing.assert_allclose(losses(split.folder), losses(alone.folder), rtol=0, atol=CURVE_TOLERANCE)
    assert split.metrics["evaluation/loss"] == pytest.approx(alone.metrics["evaluation/loss"], abs=CURVE_TOLERANCE)


@pytest.mark.nightly
@pytest.mark.parametrize("key", ["tensor_parallel", "expert_parallel"])
def test_workers_that_share_weights_or_experts_take_the_steps_of_one(cluster, tmp_path, key):
    path = "builtin:tiny?layers=2&hidden=256&context=128"
    if key == "expert_parallel":
        path = str(write_family("mixtral", tmp_path / "mixtral"))
    model = [f"model.path={path}", "model.dtype=float32", "train.learning_rate=1e-3"]
    if key == "expert_parallel":  # with equal micro-batches, whose load is balanced
        model += ["train.router_aux_loss_coefficient=0.1", "train.micro_batch_size=1"]
    alone, cut = (
        train_sft(sft_config(tmp_path, f"run.name={name}", *model, *settings))
        for name, settings in (
            ("alone", []),
            ("cut", [f"workers={{count: 2, {key}: 2, cpus: 1}}", "train.zero_stage=1"]),
        )
    )
    np.testing.assert_allclose(losses(cut.folder), losses(alone.folder), rtol=0, atol=CURVE_TOLERANCE)
    assert cut.metrics["evaluation/loss"] == pytest.approx(alone.metrics["evaluation/loss"], abs=CURVE_TOLERANCE)


@pytest.mark.slow
def test_a_reward_model_is_exported_with_its_statistics_and_format_and_scores_as_a_classifier(cluster, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rayrlhf.config.model import ModelSection
    from rayrlhf.config.reward import RewardModelSection
    from rayrlhf.engines.scoring.reward_model import RewardModelEngine

    result = train_reward(reward_config(tmp_path, "data.system_prompt=Say it."))
    assert result.metrics["evaluation/accuracy"] > 0.9
    assert result.metrics["evaluation/calibration_error"] < 0.5
    assert result.metrics["evaluation/length_accuracy"] == 1.0
    statistics = json.loads((result.export / STATISTICS_FILE).read_text())
    assert sum(statistics["margins"]["counts"]) == statistics["pairs"]

    section = ModelSection(path=str(result.export), dtype="float32")
    plain = RewardModelEngine(RewardModelSection(model=section)).score(["is it 3?"], ["yes"])
    aggregated = RewardModelEngine(RewardModelSection(model=section, normalize=True)).score(["is it 3?"], ["yes"])
    assert aggregated[0] == pytest.approx((plain[0] - statistics["mean"]) / statistics["spread"], rel=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(result.export)
    turns = [{"role": "user", "content": "is it 3?"}, {"role": "assistant", "content": "yes"}]
    turns.insert(0, {"role": "system", "content": "Say it."})
    inputs = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
    classifier = AutoModelForSequenceClassification.from_pretrained(result.export)
    assert classifier(**inputs).logits.item() == pytest.approx(plain[0], abs=1e-5)

    AnswerFormat(chat=False, end="<|im_end|>").write(result.export)
    without_turns = RewardModelEngine(RewardModelSection(model=section)).score(["is it 3?"], ["yes"])
    inputs = tokenizer("is it 3?yes<|im_end|>", return_tensors="pt")
    assert classifier(**inputs).logits.item() == pytest.approx(without_turns[0], abs=1e-5)
    said = RewardModelSection(model=section, template="{prompt} {response}")
    assert RewardModelEngine(said).score(["is it 3?"], ["yes"])[0] != pytest.approx(without_turns[0], abs=1e-5)


@pytest.mark.nightly
def test_a_reward_model_no_better_than_chance_is_not_exported(tmp_path):
    config = reward_config(tmp_path, "train.steps=2", "checkpoint.every=0", learnable=False)
    with pytest.raises(AlarmError, match="fair coins reach with probability"):
        train_reward(config)
    assert not (config.run.folder / "export").exists()
    assert train_reward(config.model_copy(update={"export_anyway": True})).export.is_dir()


@pytest.mark.nightly
def test_adapters_stay_adapters_until_they_are_merged(tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from rayrlhf.models.model_path import resolve_path
    from rayrlhf.tuning.merge import exported_model

    config = sft_config(tmp_path, "model.lora={rank: 4}", "train.steps=2", "checkpoint.every=0", "evaluation.generations=1")
    result = train_sft(config)
    base = AutoModelForCausalLM.from_pretrained(resolve_path(config.model))
    ids = torch.arange(3, 20)[None]
    start = base(ids).logits
    adapted = PeftModel.from_pretrained(base, str(result.export))(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(exported_model(result.folder, merge=True))(ids).logits
    assert (adapted - start).abs().max() > 1e-3
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5)


def test_a_dry_run_says_what_would_happen_and_starts_nothing(tmp_path):
    config = sft_config(tmp_path)
    plan = check_sft(config)
    assert "optimizer steps: 6" in plan
    assert "model: llama, log-probs within 1e-06 nats of the model's own on 32 random tokens, samples may be packed" in plan
    assert not config.run.folder.exists()


def test_a_mistake_that_only_a_worker_can_see_is_one_line_and_is_not_retried(tmp_path):
    config = reward_config(tmp_path, "model.lora={rank: 4, last_layers: 99}")
    with pytest.raises(UserError, match="last_layers 99"):
        train_reward(config)
