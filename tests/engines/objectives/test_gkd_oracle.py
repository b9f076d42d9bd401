"""A teacher's outputs through engines and objective give the loss and gradients of TRL 1.16's `GKDTrainer`."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayrlhf.config.model import ModelSection
from rayrlhf.config.policy_loss import PPOLossSection
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.policy import PolicyObjective
from rayrlhf.engines.objectives.supervised import DistillationObjective
from rayrlhf.engines.scoring import frozen
from rayrlhf.ppo.scoring import padded_rows
from tests.engines.train.test_tuning_oracle import TOLERANCE, engine_of, gradient_error, step_of, trl_model_gradients
from tests.engines.training import random_batch, random_sequences, write_llama

WORDS = 61
SEQUENCES = random_sequences(5, seed=4)

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return write_llama(root / "student"), write_llama(root / "teacher", layers=3, seed=1)


def teacher_outputs(folder, monkeypatch, vocabulary, tokens=WORDS):
    monkeypatch.setattr(frozen, "load_tokenizer", lambda _: range(tokens))
    engine = frozen.FrozenEngine(ModelSection(path=str(folder), dtype="float32"), 40, vocabulary=vocabulary)
    return engine.score(SEQUENCES, frozenset({"logprobs", "hidden"}))


def training_batch(scores):
    """Advantages are 0, so the divergence is the whole objective."""
    batch = random_batch(SEQUENCES)
    arrays = {name: batch.arrays[name] for name in ("old_logprobs", "action_mask")}
    arrays["advantages"] = np.zeros_like(arrays["old_logprobs"])
    for name in ("teacher_ids", "teacher_logprobs"):
        arrays[name] = padded_rows([getattr(row, name) for row in scores], batch.width).numpy()
    return TrainingBatch(SEQUENCES, arrays)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_step_of_a_teacher_over_the_whole_vocabulary_is_that_of_trl(folders, monkeypatch, beta, packing):
    from trl.experimental.gkd import GKDTrainer

    student, teacher = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    batch = training_batch(teacher_outputs(folders[1], monkeypatch, WORDS))
    logits, known, labels = [], [], []
    for row, sequence in enumerate(SEQUENCES):
        ids, start = torch.from_numpy(sequence.token_ids).long()[None], sequence.prompt_length
        logits.append(student(ids).logits[:, start - 1 : -1])
        known.append(teacher(ids).logits[:, start - 1 : -1].detach())
        taken = torch.from_numpy(batch.arrays["action_mask"][row, : sequence.response_length].copy())
        labels.append(torch.where(taken, 0, -100)[None])
    wanted = GKDTrainer.generalized_jsd_loss(*(torch.cat(parts, 1) for parts in (logits, known, labels)), beta=beta)
    (wanted * 3).backward()
    objective = PolicyObjective(PPOLossSection(), distillation=DistillationObjective(beta=beta, coefficient=3))
    report, gradients = step_of(engine_of(folders[0], frozenset({"lm"}), packing=packing), batch, objective)
    assert report.metrics["loss/distillation"] == pytest.approx(wanted.item(), abs=TOLERANCE)
    assert gradient_error(gradients, trl_model_gradients(student)) <= 3 * TOLERANCE


def test_a_teacher_sends_its_most_likely_tokens_and_none_of_the_padding_of_its_output_layer(folders, monkeypatch):
    teacher = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32)
    for sequence, scores in zip(SEQUENCES, teacher_outputs(folders[1], monkeypatch, 3, tokens=40), strict=True):
        ids = torch.from_numpy(sequence.token_ids).long()[None]
        rows = teacher(ids).logits[0, sequence.prompt_length - 1 : -1]
        known = rows[:, :40].log_softmax(-1).topk(3)
        assert scores.hidden is None
        assert scores.teacher_ids.tolist() == known.indices.tolist()
        torch.testing.assert_close(torch.from_numpy(scores.teacher_logprobs[:, :3]), known.values.detach(), atol=1e-5, rtol=0)
        assert np.exp(scores.teacher_logprobs).sum(1) == pytest.approx(1, abs=1e-5)
        own = rows.log_softmax(-1).gather(1, ids[0, sequence.prompt_length :, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(scores.logprobs), own.detach(), atol=1e-5, rtol=0)
