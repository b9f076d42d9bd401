"""Whole steps with demonstrations before the prompts: who read what, and that the maths covers the response alone.

One process is policy, reference and critic, since each would read the same sequences in one of its own.
"""

import json

import numpy as np
import pytest
import torch

from rayrlhf.models.load import load_causal_model, load_tokenizer
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.run_prompts import load_prompts
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config

SHOWN = [
    "model.path=builtin:tiny?layers=1&hidden=64&context=256",
    "model.dtype=float32",
    "rollout.max_model_length=256",
    "rollout.backend=transformers",
    "rollout.prompts_per_step=8",
    "run.steps=1",
    "observe.tensorboard=false",
    "checkpoint.every=0",
    "algorithm.kl.coefficient=0.01",
    "critic.kind=shared",
    "model.lora={rank: 2}",
    "evaluation.enabled=false",
]

pytestmark = pytest.mark.usefixtures("cluster")


class Kept(Callback):
    """Keeps what the models said of a step's rollouts."""

    def on_step_end(self, step, metrics, scored):
        self.metrics, self.scored = metrics, scored


def logprobs(model, sequence):
    """Of each response token, from whole logits of the start weights."""
    with torch.no_grad():
        logits = model(torch.from_numpy(sequence.token_ids.astype(np.int64))[None]).logits[0, :-1]
    ids = torch.from_numpy(sequence.token_ids[1:].astype(np.int64))
    return logits.log_softmax(-1).gather(1, ids[:, None])[sequence.prompt_length - 1 :, 0].numpy()


@pytest.mark.parametrize(
    "train_with", [pytest.param("with_demonstrations", marks=pytest.mark.nightly), "without_demonstrations"]
)
def test_what_is_trained_reads_the_context_or_the_bare_prompt_and_learns_the_response_alone(tmp_path, train_with):
    pool = tmp_path / "pool.jsonl"
    rows = [{"prompt": f"say number {number}", "completion": f"{number}{number}"} for number in range(9)]
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = f"rollout.demonstrations={{count: 2, pool: {{path: {pool}}}, train_with: {train_with}}}"
    config, kept = run_config(tmp_path, *SHOWN, shown), Kept()
    train_ppo(config, [kept])
    prompts = {prompt.id: prompt for prompt in load_prompts(config)[0]}
    tokenizer, model = load_tokenizer(config.model), load_causal_model(config.model)
    gaps = []
    for index, rollout in enumerate(kept.scored.rollouts):
        prompt = prompts[rollout.key.prompt]
        assert np.array_equal(rollout.prompt_ids, prompt.token_ids)
        assert tokenizer.decode(rollout.prompt_ids).count("say number") == (2 if train_with == "with_demonstrations" else 0)
        assert len(rollout.action_mask) == len(rollout.response_ids) == len(rollout.logprobs)
        expected = logprobs(model, rollout.sequence())
        for forward_pass in ("policy", "reference"):
            np.testing.assert_allclose(kept.scored.forward_passes[forward_pass][index].logprobs, expected, atol=1e-4)
        gaps.append(np.abs(rollout.logprobs - expected))
    difference = float(np.concatenate(gaps).mean())
    if train_with == "with_demonstrations":
        assert difference < 1e-4
        assert kept.metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(difference, abs=1e-5)
    else:
        assert difference > 1e-3
        assert kept.metrics["context/logp_difference/mean"] == pytest.approx(difference, rel=1e-3)
        assert not any(name.startswith("sampling/sampling_logp") for name in kept.metrics)
    assert kept.metrics["policy/grad_norm"] > 0
    before = read_metrics(config.run.folder)
    assert train_ppo(config).steps == 1, "the same call finds the finished run"
    assert read_metrics(config.run.folder) == before
