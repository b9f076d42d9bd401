"""Runs that are rewarded by a process reward model, and by a classifier in vLLM's pooling mode."""

import numpy as np
import pytest
import torch

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.engines.scoring.reward_ensemble import RewardEnsemble
from rayrlhf.errors import UserError
from rayrlhf.models.model_path import model_folder
from rayrlhf.models.tiny import byte_tokenizer
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.train_ppo import train_ppo
from rayrlhf.rewards.step_rewards import split_steps
from tests.models.families import write_family
from tests.ppo.runs import SETTINGS, run_config


class Collects(Callback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, step, metrics, scored):
        self.steps.append(scored)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A token classifier of the tiny family with a random head, saved as transformers saves it."""
    from transformers import AutoModelForTokenClassification

    from rayrlhf.config.model import ModelSection

    folder = tmp_path_factory.mktemp("classifier") / "model"
    start = model_folder(ModelSection(path="builtin:tiny?layers=1&hidden=64&context=256"))
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_pretrained(start, num_labels=2)
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_run_pays_each_step_at_its_last_token(classifier, tmp_path):
    steps = "{aggregate: product, separator: e}"
    config = run_config(
        tmp_path, "model.path=builtin:tiny?layers=2&hidden=64&context=128", "rollout.max_model_length=128",
        "rollout.backend=transformers", "rollout.max_new_tokens=48", "critic.kind=shared", "reward.functions=[]",
        f"reward.model={{model: {{path: {classifier}, dtype: float32}}, steps: {steps}}}", "evaluation.enabled=false",
    )  # fmt: skip
    collects = Collects()
    assert train_ppo(config, [collects]).steps == 2
    ensemble, letter = RewardEnsemble(config.reward.model), byte_tokenizer().encode("e", add_special_tokens=False)
    counts = []
    for scored in collects.steps:
        prompts = [scored.prompts[rollout.key.prompt].text for rollout in scored.rollouts]
        found = ensemble.score(prompts, [rollout.text for rollout in scored.rollouts])
        np.testing.assert_allclose(scored.rewards.scores, found, atol=1e-4)
        for rollout, score, tokens in zip(scored.rollouts, scored.rewards.scores, scored.rewards.tokens, strict=True):
            assert tokens.sum() == pytest.approx(float(score), abs=1e-5)
            ends = {*np.flatnonzero(rollout.response_ids == letter[0]).tolist(), len(tokens) - 1}
            assert {*np.flatnonzero(tokens).tolist()} <= ends
            counts.append(len(split_steps(rollout.text, "e")[0]))
    assert max(counts) > 1
    rows = [row for row in read_metrics(config.run.folder) if "reward/reward_model_steps" in row]
    assert np.mean([row["reward/reward_model_steps"] for row in rows]) == pytest.approx(np.mean(counts))


@pytest.mark.slow
def test_a_run_is_rewarded_by_vllm_as_by_torch(tmp_path):
    from transformers import AutoModelForSequenceClassification

    start = write_family("qwen3", tmp_path / "start", vocab_size=259, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1)
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    settings = f"model: {{path: {tmp_path / 'model'}, dtype: float32}}, template: '{{prompt}}{{response}}'"
    config = run_config(
        tmp_path, "rollout.backend=transformers", "critic.kind=shared", "reward.functions=[]", "evaluation.enabled=false",
        f"reward.model={{{settings}, backend: vllm, kv_cache_gib: 0.05}}",
    )  # fmt: skip
    collects = Collects()
    assert train_ppo(config, [collects]).steps == 2
    torch_section = config.reward.model.model_copy(update={"backend": "torch", "kv_cache_gib": None})
    ensemble = RewardEnsemble(torch_section)
    for scored in collects.steps:
        prompts = [scored.prompts[rollout.key.prompt].text for rollout in scored.rollouts]
        found = ensemble.score(prompts, [rollout.text for rollout in scored.rollouts])
        np.testing.assert_allclose(scored.rewards.scores, found, rtol=1e-4, atol=1e-4)
        assert np.std(found) > 0.1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.shaping.scale=true"], r"switch them off, or set per to 'response' for reward\.model\.steps"),
        (["environment={name: calculator}"], r"reward\.model\.steps\.per 'step' pays no steps of turns in an environment"),
    ],
)
def test_settings_that_do_not_fit_payments_of_steps_are_refused(overrides, message):
    own = ["data.train.path=rows.jsonl", "reward.model={model: {path: m}, steps: {}}", "evaluation.enabled=false"]
    with pytest.raises(UserError, match=message):
        load_config(PPOConfig, None, [*SETTINGS, *own, *overrides])
    load_config(PPOConfig, None, [*SETTINGS, *own, *overrides, "reward.model.steps.per=response"])
