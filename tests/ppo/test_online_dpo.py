"""Online DPO: pairs by rank, their loss and gradients against the formula, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayrlhf.algorithms.preference_pairs import ranked_pairs
from rayrlhf.data.records import SampleKey
from rayrlhf.errors import UserError
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.experience import ExperienceMaker
from rayrlhf.ppo.pair_batch import pair_batch
from rayrlhf.ppo.rollout_collector import forward_passes
from rayrlhf.ppo.train_ppo import train_ppo
from rayrlhf.ppo.update_objectives import make_objectives, plan_update
from tests.engines.train.test_tuning_oracle import TOLERANCE, engine_of, gradient_error, step_of, trl_model_gradients
from tests.engines.training import join_alone, write_llama
from tests.ppo.runs import run_config
from tests.ppo.test_experience import load, scored

ONLINE = ["preset=online-dpo", "rollout.prompts_per_step=2", "rollout.max_new_tokens=4"]
RESPONSES = [[5, 9], [7, 3, 8], [11, 6, 2, 4], [40, 41]]


def test_the_best_is_paired_with_the_worst_and_equal_scores_with_none():
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 5.0, 5.0, torch.nan, 1.0, 0.0, 0.0, 4.0, 2.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3])
    assert ranked_pairs(scores, groups) == [(1, 0), (7, 8), (10, 9)]
    assert ranked_pairs(torch.tensor([0.0, 1.0, 3.0, 2.0]), torch.zeros(4, dtype=torch.long)) == [(2, 0), (3, 1)]


def two_prompts(scores):
    """Two responses to each of two prompts of one token, whose reference finds each token less likely by its number."""
    policy = [[-1.0] * len(response) for response in RESPONSES]
    reference = [[-1.5 - column for column in range(len(response))] for response in RESPONSES]
    rows = scored(RESPONSES, [True] * 4, scores, policy, reference, [[0.0] * 5] * 4)
    rollouts = [replace(rollout, key=SampleKey(0, row // 2, row % 2)) for row, rollout in enumerate(rows.rollouts)]
    return replace(rows, rollouts=tuple(rollouts))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_loss_and_gradients_are_those_of_the_formula(tmp_path, loss):
    join_alone()
    folder = write_llama(tmp_path / "llama")
    config = load(*ONLINE, f"algorithm.online_dpo.loss={loss}", "algorithm.online_dpo.beta=0.3")
    experience = ExperienceMaker(config).make(two_prompts([1.0, 3.0, 5.0, 4.0]))
    batch, _, groups = pair_batch(experience)
    assert [row for step in plan_update(groups, 1, 4, 0, 0).epochs[0] for row in sorted(step)] == [0, 1, 2, 3]
    objective = make_objectives(config)["policy"]
    report, gradients = step_of(engine_of(folder, frozenset({"lm"})), batch, objective)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    margins = []
    for better, worse in ((1, 0), (2, 3)):
        ratios = []
        for row in (better, worse):
            ids = torch.tensor([[0, *RESPONSES[row]]])
            logprobs = (oracle(ids).logits[0, :-1] / 0.9).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            known = sum(-1.5 - column for column in range(len(RESPONSES[row])))
            # IPO reads means per token (Azar et al. 2024), TRL's online trainer sums.
            ratios.append((logprobs.sum() - known) / (len(RESPONSES[row]) if loss == "ipo" else 1))
        margins.append(ratios[0] - ratios[1])
    margins = torch.stack(margins)
    losses = (margins - 1 / 0.6).square() if loss == "ipo" else -torch.nn.functional.logsigmoid(0.3 * margins)
    losses.mean().backward()
    assert report.metrics["loss/direct_preference"] == pytest.approx(losses.mean().item(), abs=TOLERANCE)
    assert gradient_error(gradients, trl_model_gradients(oracle)) <= 2 * TOLERANCE


def test_a_step_without_pairs_has_no_optimizer_step():
    experience = ExperienceMaker(load(*ONLINE)).make(two_prompts([1.0, 1.0, 5.0, 5.0]))
    batch, keys, groups = pair_batch(experience)
    assert (batch, keys, groups) == (experience.batch, experience.keys, [])
    assert plan_update(groups, 1, 4, 0, 0).epochs == [[]]


def test_a_pair_with_a_response_that_is_left_out_is_left_out():
    experience = ExperienceMaker(load(*ONLINE)).make(two_prompts([1.0, 3.0, 5.0, 4.0]))
    mask = experience.batch.arrays["action_mask"].copy()
    mask[0] = False
    arrays = {**experience.batch.arrays, "action_mask": mask}
    batch, keys, groups = pair_batch(replace(experience, batch=replace(experience.batch, arrays=arrays)))
    assert (groups, keys) == ([[0, 1]], [SampleKey(0, 1, 0), SampleKey(0, 1, 1)])
    assert [sequence.token_ids.tolist() for sequence in batch.sequences] == [[0, *RESPONSES[2]], [0, *RESPONSES[3]]]
    assert batch.arrays["reference_logprob"][:, 0].tolist() == [-12.0, -4.0]


def test_the_reference_is_read_and_the_policy_shows_that_the_sync_arrived():
    config = load(*ONLINE)
    assert config.needs_reference
    assert config.old_logprobs == "recomputed"
    assert [one.name for one in forward_passes(config, (), has_critic=False)] == ["reference", "policy"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["algorithm.online_dpo=null"], "estimator 'pairs' needs the section algorithm.online_dpo"),
        (["algorithm.advantage.estimator=grpo"], "online_dpo: algorithm.advantage.estimator 'grpo' has no effect"),
        (["algorithm.policy_loss.clip_low=0.1"], "online_dpo: algorithm.policy_loss has no effect"),
        (["algorithm.kl.coefficient=0.1"], "online_dpo: algorithm.kl.coefficient above 0 has no effect"),
        (["algorithm.off_policy_correction.level=token"], "online_dpo: algorithm.off_policy_correction has no effect"),
        (["async.max_staleness=1"], "online_dpo: .* has no effect"),
        (["train.early_stop_kl=0.1"], "online_dpo: train.early_stop_kl has no effect"),
        (["teacher.model.path=builtin:tiny"], "online_dpo: teacher has no effect"),
        (["algorithm.online_dpo.loss=ipo", "algorithm.online_dpo.label_smoothing=0.1"], "no effect on loss ipo"),
        (["rollout.samples_per_prompt=1"], "set rollout.samples_per_prompt to 2 or more"),
        (["rollout.prompts_per_step=9", "train.mini_batch_size=3"], "mini_batch_size 3 would split a pair"),
    ],
)
def test_settings_that_pairs_do_not_read_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        load(*ONLINE, *settings)


@pytest.mark.slow
def test_a_policy_learns_its_reward_from_pairs(tmp_path):
    config = run_config(
        tmp_path,
        "preset=online-dpo",
        "rollout.backend=transformers",
        "rollout.prompts_per_step=32",
        "rollout.samples_per_prompt=4",
        "train.mini_batch_size=32",
        "train.learning_rate=3e-3",
        "evaluation.enabled=false",
        "run.steps=10",
    )
    train_ppo(config)
    rows = [row for row in read_metrics(config.run.folder) if "objective/scores" in row]
    scores = [row["objective/scores"] for row in rows]
    assert np.mean(scores[-3:]) > scores[0] + 0.3
    assert all(row["policy/optimizer_steps"] > 0 for row in rows)
