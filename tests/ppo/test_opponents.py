"""XPO and Nash-MD: losses recorded from TRL, samples of reference and mixture, batches, metrics, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayrlhf.algorithms.opponents import mixture_logits, opponent_pairs
from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.data.records import Prompt, RolloutRequest, SampleKey
from rayrlhf.engines.objectives.preference import DirectPreferenceObjective, NashObjective
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.engines.rollout.hf import TransformersRolloutEngine
from rayrlhf.errors import UserError
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.experience import ExperienceMaker
from rayrlhf.ppo.pair_batch import trained_batch
from rayrlhf.ppo.rollout_collector import RequestBuilder
from rayrlhf.ppo.step_metrics import reward_metrics
from rayrlhf.ppo.train_ppo import train_ppo
from rayrlhf.ppo.update_objectives import make_objectives
from tests.ppo.runs import run_config
from tests.ppo.test_experience import load
from tests.ppo.test_online_dpo import RESPONSES, two_prompts

XPO = ["preset=xpo", "rollout.prompts_per_step=2", "rollout.max_new_tokens=4"]
NASH = ["preset=nash-md", "rollout.prompts_per_step=2", "rollout.max_new_tokens=4"]
TEMPERATURE = 0.9

OWN = torch.tensor([[-1.0, -2.0, -0.5], [-0.25, -1.5, 0.0]])
OTHER = torch.tensor([[-0.75, -1.25, -2.0], [-3.0, -0.5, 0.0]])
REFERENCE_OWN = torch.tensor([[-1.5, -1.0, -0.75], [-0.5, -2.5, 0.0]])
REFERENCE_OTHER = torch.tensor([[-0.5, -1.0, -1.5], [-2.0, -0.25, 0.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_xpo_has_the_loss_and_gradient_of_trl_0_24():
    # `XPOTrainer._compute_losses`, beta 0.3, alpha 0.2: the policy's response is chosen in pair 0, the reference's in pair 1.
    logprobs = torch.stack([OWN[0], OTHER[0], OTHER[1], OWN[1]]).requires_grad_()
    reference = torch.stack([REFERENCE_OWN[0], REFERENCE_OTHER[0], REFERENCE_OTHER[1], REFERENCE_OWN[1]])
    column = torch.zeros(4, 3)
    arrays = {
        "action_mask": MASK[[0, 0, 1, 1]],
        "reference_logprob": column + reference.sum(1, keepdim=True),
        "opponent": column + torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None],
    }
    parts = DirectPreferenceObjective(beta=0.3, exploration=0.2).compute({"logprobs": logprobs}, arrays)
    loss = sum(part.coefficient * part.token_loss.loss.mean() for part in parts)
    loss.backward()
    assert loss.item() == pytest.approx(0.11191648244857788, abs=1e-5)
    found = logprobs.grad[:, 0].tolist()
    expected = [-0.06659791618585587, 0.16659791767597198, -0.0018768087029457092, 0.10187681019306183]
    assert found == pytest.approx(expected, abs=1e-5)


def test_nash_md_has_the_loss_and_gradient_of_trl_0_24():
    # `NashMDTrainer._compute_losses` with beta 0.3.
    logprobs = OWN.clone().requires_grad_()
    arrays = {
        "action_mask": MASK,
        "reference_logprobs": torch.where(MASK, REFERENCE_OWN, torch.nan),
        "preference": torch.tensor([[0.8, 0, 0], [0.35, 0, 0]]),
    }
    (part,) = NashObjective(beta=0.3).compute({"logprobs": logprobs}, arrays)
    loss = part.token_loss.loss.mean()
    loss.backward()
    assert loss.item() == pytest.approx(0.3656250238418579, abs=1e-5)
    # The recorded gradient of row 1, token 2 is that of padding, which is masked here.
    expected = [
        [-0.07500000298023224, -0.30000001192092896, -0.11250000447034836],
        [0.11250000447034836, 0.22500000894069672, 0],
    ]
    torch.testing.assert_close(logprobs.grad, torch.tensor(expected), rtol=0, atol=1e-5)
    assert part.token_loss.statistics["nash/kl"].flatten().tolist() == [-0.25, 1.25]


def test_a_mixture_is_the_normalized_product_of_powers():
    policy, reference = torch.randn(3, 7), torch.randn(3, 7)
    product = policy.softmax(-1) ** 0.7 * reference.softmax(-1) ** 0.3
    mixed = mixture_logits(policy, reference, torch.tensor([0.3, 0.0, 1.0])).softmax(-1)
    torch.testing.assert_close(mixed[0], (product / product.sum(-1, keepdim=True))[0])
    torch.testing.assert_close(mixed[1:], torch.stack([policy[1], reference[2]]).softmax(-1))


def test_each_sample_of_the_policy_is_paired_with_its_opponents():
    scores = torch.tensor([1.0, 2.0, 3.0, 0.0, torch.nan, 1.0, 5.0, 4.0])
    groups, samples = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3]), torch.tensor([1, 0, 2, 3, 0, 1, 0, 1])
    assert opponent_pairs(scores, groups, samples) == [(1, 0), (2, 3)]


def logprobs_of(model, ids, prompt_length):
    return model(torch.tensor([ids])).logits[0, prompt_length - 1 : -1]


@torch.no_grad()
def test_the_engine_samples_from_policy_reference_and_mixture_also_after_new_weights():
    section = ModelSection(path="builtin:tiny?layers=2&hidden=64&context=64", dtype="float32")
    rollout = RolloutSection(backend="transformers", max_new_tokens=5, max_concurrent=4)
    engine = TransformersRolloutEngine(RolloutSpec(section, rollout, 0, reference=section))
    policy, reference = engine._network, AutoModelForCausalLM.from_pretrained(engine._network.name_or_path)
    generator = torch.Generator().manual_seed(0)
    weights = [(name, value + 0.1 * torch.randn(value.shape, generator=generator)) for name, value in policy.named_parameters()]
    engine.begin_weights(1)
    engine.receive_weights(weights)
    engine.finish_weights()
    prompts = [np.arange(5, 5 + length, dtype=np.int32) for length in (3, 6, 4, 5, 2, 3)]
    shares = [0.0, 0.5, 1.0, 0.25, 0.0, 1.0]
    requests = [
        RolloutRequest(SampleKey(0, row, row % 2), prompt, row, reference_share=share)
        for row, (prompt, share) in enumerate(zip(prompts, shares, strict=True))
    ]
    engine.submit(requests, temperature=TEMPERATURE, max_new_tokens=5)
    found = {rollout.key.prompt: rollout for rollout in engine.poll(len(requests))}
    for row, (prompt, share) in enumerate(zip(prompts, shares, strict=True)):
        response = found[row].response_ids
        ids = [*prompt.tolist(), *response.tolist()]
        own, known = (logprobs_of(model, ids, len(prompt)).log_softmax(-1) for model in (policy, reference))
        expected = (((1 - share) * own + share * known) / TEMPERATURE).log_softmax(-1)
        taken = expected.gather(1, torch.tensor(response[:, None], dtype=torch.long))[:, 0]
        np.testing.assert_allclose(found[row].logprobs, taken.numpy(), atol=1e-4)
    with pytest.raises(ValueError, match="has no reference"):
        TransformersRolloutEngine(RolloutSpec(section, rollout, 0)).submit(requests, temperature=TEMPERATURE, max_new_tokens=5)


@pytest.mark.parametrize(("settings", "share"), [(XPO, 1.0), (NASH, 0.5), (["preset=online-dpo"], 0.0)])
def test_each_second_training_sample_is_the_opponents_and_no_evaluation(settings, share):
    builder = RequestBuilder(load(*settings))
    prompts = [Prompt(number, "p", np.array([3, 4], np.int32), {}) for number in range(2)]
    assert [one.reference_share for one in builder.build(prompts, 4, 0)] == [0.0, share] * 4
    assert [one.reference_share for one in builder.build([*prompts, *prompts], 1, 0)] == [0.0] * 4


def test_the_pairs_of_xpo_name_the_samples_of_the_reference():
    config = load(*XPO)
    experience = ExperienceMaker(config).make(two_prompts([1.0, 3.0, 5.0, 4.0]))
    batch, keys, groups = trained_batch(config, experience)
    assert groups == [[0, 1], [2, 3]]
    assert [(key.prompt, key.sample) for key in keys] == [(0, 1), (0, 0), (1, 0), (1, 1)]  # the better one first
    assert batch.arrays["opponent"][:, 0].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert make_objectives(config)["policy"].exploration == 1e-5
    tied = ExperienceMaker(config).make(two_prompts([1.0, 1.0, 5.0, 4.0]))
    assert [key.prompt for key in trained_batch(config, tied).keys] == [1, 1]


def test_nash_md_trains_on_the_policys_samples_with_their_probability_to_be_preferred():
    config = load(*NASH)
    experience = ExperienceMaker(config).make(two_prompts([1.0, 3.0, 5.0, 4.0]))
    batch, keys, groups = trained_batch(config, experience)
    assert groups == [[0], [1]]
    assert [(key.prompt, key.sample) for key in keys] == [(0, 0), (1, 0)]
    assert [sequence.token_ids.tolist() for sequence in batch.sequences] == [[0, *RESPONSES[0]], [0, *RESPONSES[2]]]
    expected = torch.sigmoid(torch.tensor([-2.0, 1.0])).tolist()
    assert batch.arrays["preference"][:, 0].tolist() == pytest.approx(expected)
    assert batch.arrays["reference_logprobs"].tolist() == [[-1.5, -2.5, 0.0, 0.0], [-1.5, -2.5, -3.5, -4.5]]
    assert config.updates_per_step == 1
    unknown = replace(experience, scores=torch.full((4,), torch.nan))
    assert trained_batch(config, unknown).groups == []


def test_metrics_count_the_policys_samples_alone():
    scored = two_prompts([1.0, 3.0, 5.0, 4.0])
    own, both = (ExperienceMaker(load(*settings)).make(scored).metrics for settings in (XPO, ["preset=online-dpo"]))
    assert own["objective/scores"] == 3.0
    assert both["objective/scores"] == 3.25
    parts = replace(scored, rewards=replace(scored.rewards, parts={"one": scored.rewards.scores}))
    assert reward_metrics(parts, np.array([True, False, True, False]))["reward/one"] == 3.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            [*XPO, "rollout.backend=vllm"],
            "variant 'xpo' samples from its opponent too: rollout.backend 'vllm', expected",
        ),
        ([*NASH, "rollout.samples_per_prompt=3", "train.mini_batch_size=6"], "samples_per_prompt 3, expected an even number"),
        ([*XPO, "rollout.refill_rounds=2"], "rollout.refill_rounds, expected 0"),
        ([*XPO, "observe.record=light"], "observe.record 'light', expected 'off'"),
        ([*XPO, "algorithm.online_dpo.mixture=0.3"], "mixture has no effect on variant xpo"),
        ([*NASH, "algorithm.online_dpo.alpha=0.3"], "alpha has no effect on variant nash_md"),
        ([*NASH, "algorithm.online_dpo.loss=ipo"], "loss has no effect on variant nash_md"),
        (["preset=online-dpo", "algorithm.online_dpo.alpha=0.3"], "alpha has no effect on variant online_dpo"),
    ],
)
def test_settings_without_effect_or_opponent_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        load(*settings)


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        pytest.param("xpo", ["train.learning_rate=3e-3", "run.steps=6"], marks=pytest.mark.nightly),
        # Scores in [0, 1] differ little, so that preferences are near 1/2, and a beta of 0.1 holds the policy where it is.
        pytest.param(
            "nash-md",
            ["algorithm.online_dpo.beta=0.01", "train.learning_rate=1e-2", "run.steps=10"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_policy_learns_its_reward_against_an_opponent(tmp_path, preset, settings):
    config = run_config(
        tmp_path,
        f"preset={preset}",
        "rollout.prompts_per_step=32",
        "rollout.samples_per_prompt=4",
        "train.mini_batch_size=32",
        "evaluation.enabled=false",
        *settings,
    )
    train_ppo(config)
    rows = [row for row in read_metrics(config.run.folder) if "objective/scores" in row]
    scores = [row["objective/scores"] for row in rows]
    assert np.mean(scores[-2:]) > scores[0] + 0.05
    assert all(row["policy/optimizer_steps"] > 0 for row in rows)
