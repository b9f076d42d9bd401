"""A process reward model takes the loss and gradients that TRL 1.8's `PRMTrainer` takes on the same batch.

TRL 1.16 has no `PRMTrainer`. Its loss was that of a token classifier with two labels in transformers, which is the oracle here.
"""

import numpy as np
import pytest
import torch

from rayrlhf.data.supervised.supervised_samples import StepSample
from rayrlhf.engines.objectives.preference import StepObjective
from rayrlhf.engines.train.supervised_batches import step_batch
from tests.engines.train.test_tuning_oracle import PAD, TOLERANCE, engine_of, gradient_error, step_of
from tests.engines.training import write_llama

pytestmark = pytest.mark.usefixtures("alone")


def random_steps(count, seed=0):
    generator = np.random.default_rng(seed)
    samples = []
    for row in range(count):
        ids = generator.integers(2, 61, generator.integers(6, 30)).astype(np.int32)
        ends = generator.random(len(ids)) < 0.3
        ends[0], ends[-1] = False, row % 2 == 0  # a cut response ends within a step
        ends[2] = True
        samples.append(StepSample(ids, ends, row, ends & (generator.random(len(ids)) < 0.5)))
    return samples


@pytest.mark.parametrize("packing", [False, True])
def test_steps_have_the_loss_and_gradients_of_a_token_classifier(tmp_path, packing):
    from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

    from rayrlhf.models.tiny import byte_tokenizer

    model, samples = write_llama(tmp_path / "model"), random_steps(6)
    engine = engine_of(model, frozenset({"value"}), packing=packing, head_bias=True)
    oracle = AutoModelForTokenClassification.from_pretrained(model, num_labels=2, dtype=torch.float32).eval()
    head = engine._network.v_head.summary.weight.detach()
    with torch.no_grad():  # one logit is the difference of two
        oracle.score.weight.copy_(torch.cat([-0.5 * head, 0.5 * head]))
        oracle.score.bias.zero_()
    tokenizer = byte_tokenizer()
    tokenizer.pad_token_id = PAD
    rows = [
        {"input_ids": one.token_ids.tolist(), "labels": np.where(one.loss_mask, one.right, -100).astype(int).tolist()}
        for one in samples
    ]
    output = oracle(**DataCollatorForTokenClassification(tokenizer)(rows))
    output.loss.backward()

    report, gradients = step_of(engine, step_batch(samples), StepObjective())
    labels = torch.tensor([label for row in rows for label in row["labels"] if label != -100])
    chosen = torch.cat([output.logits[n, : len(one.token_ids)][one.loss_mask] for n, one in enumerate(samples)]).argmax(-1)
    assert report.metrics["loss/steps"] == pytest.approx(output.loss.item(), abs=TOLERANCE)
    assert report.metrics["accuracy"] == pytest.approx((chosen == labels).float().mean().item())
    expected = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    for part in ("weight", "bias"):  # the gradient of the difference is that of its second logit, and minus that of the first
        np.testing.assert_allclose(expected[f"score.{part}"][0], -expected[f"score.{part}"][1], atol=TOLERANCE)
        expected[f"score.{part}"] = expected[f"score.{part}"][1:]
    found = {name.replace("v_head.summary.", "score."): gradient for name, gradient in gradients.items()}
    assert gradient_error(found, expected) <= TOLERANCE
