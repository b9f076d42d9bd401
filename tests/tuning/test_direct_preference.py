"""DPO on Ray Train: it begins as its reference, learns, resumes, and neither workers nor packing change its curve."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from rayrlhf.observe.metrics import read_metrics
from rayrlhf.tuning.direct_preference_task import FOLDER
from rayrlhf.tuning.train_model import train_dpo
from tests.tuning.runs import copied, dpo_config

CURVE_TOLERANCE = 1e-4


def losses(folder):
    return [row["loss"] for row in read_metrics(folder) if "loss" in row]


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory, cluster):
    folder = tmp_path_factory.mktemp("one")
    return dpo_config(folder), train_dpo(dpo_config(folder))


@pytest.mark.slow
def test_a_run_begins_as_its_reference_and_learns_the_pairs(one_worker):
    _, result = one_worker
    evaluations = [row for row in read_metrics(result.folder) if "evaluation/loss" in row]
    assert losses(result.folder)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert evaluations[0]["evaluation/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert evaluations[0]["evaluation/margin"] == 0.0
    assert result.metrics["evaluation/accuracy"] == 1.0
    assert result.metrics["evaluation/loss"] < math.log(2) - 0.3


@pytest.mark.slow
def test_the_rewards_of_the_exported_policy_are_those_transformers_finds(one_worker):
    from transformers import AutoModelForCausalLM

    from rayrlhf.data.supervised.datasets import load_preference_data
    from rayrlhf.models.load import load_causal_model, load_tokenizer

    config, result = one_worker
    _, held_out = load_preference_data(config.data, load_tokenizer(config.model))
    models = [AutoModelForCausalLM.from_pretrained(result.export, dtype=torch.float32), load_causal_model(config.model)]
    rewards = []
    for pair in held_out.samples:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(answer.token_ids.astype(np.int64))
            sums = []
            for model in models:
                with torch.no_grad():
                    logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
                own = logprobs.gather(1, ids[1:, None])[:, 0]
                sums.append(float(own[torch.from_numpy(answer.loss_mask[1:])].sum()))
            rewards.append(0.1 * (sums[0] - sums[1]))
    assert np.mean(rewards[::2]) == pytest.approx(result.metrics["evaluation/reward_chosen"], abs=1e-4)
    assert np.mean(rewards[1::2]) == pytest.approx(result.metrics["evaluation/reward_rejected"], abs=1e-4)


@pytest.mark.slow
def test_a_run_that_lost_its_export_reads_its_reference_again_and_ends_the_same(one_worker, tmp_path):
    config, alone = one_worker
    config = copied(config, tmp_path)
    folder = config.run.folder
    stored = {path.name: path.read_bytes() for path in (folder / FOLDER).iterdir()}
    assert len(stored) == 2  # pairs to train on, and held-out ones
    shutil.rmtree(folder / "export")
    (folder / "result.json").unlink()
    again = train_dpo(config)
    assert again.metrics == alone.metrics
    assert {path.name: path.read_bytes() for path in (folder / FOLDER).iterdir()} == stored


@pytest.mark.slow
def test_two_workers_packed_rows_and_unshared_prefixes_have_the_loss_curve_of_one_worker(one_worker, tmp_path):
    _, alone = one_worker
    settings = ["workers.count=2", "train.packing=true", "train.micro_batch_tokens=256", "train.share_prefixes=off"]
    both = train_dpo(dpo_config(tmp_path, *settings))
    np.testing.assert_allclose(losses(both.folder), losses(alone.folder), rtol=0, atol=CURVE_TOLERANCE)
    saved = [
        [row["tokens/shared_fraction"] for row in read_metrics(result.folder) if "loss" in row] for result in (alone, both)
    ]
    assert min(saved[0]) > 0.3
    assert max(saved[1]) == 0


@pytest.mark.slow
def test_adapters_have_their_base_as_reference_and_are_exported_alone(tmp_path, cluster):
    config = dpo_config(tmp_path, "model.lora={rank: 4}", "train.steps=2", "train.loss=ipo")
    result = train_dpo(config)
    first = next(row for row in read_metrics(result.folder) if "evaluation/loss" in row)
    assert first["evaluation/loss"] == pytest.approx(25.0, abs=1e-3)  # (0 - 1 / (2 x 0.1))^2
    assert json.loads((result.export / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.slow
def test_without_reference_the_rewards_are_log_probs(tmp_path, cluster):
    result = train_dpo(dpo_config(tmp_path, "train.reference=none", "train.steps=1"))
    first = next(row for row in read_metrics(result.folder) if "evaluation/loss" in row)
    assert first["evaluation/reward_chosen"] < -1.0  # ten random letters are not likely
    assert not (result.folder / FOLDER).exists()
