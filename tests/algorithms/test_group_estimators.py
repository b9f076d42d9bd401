"""Estimators without a critic, against TRL 1.16's trainers where it has them, else against sums written out by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from rayrlhf.algorithms.advantages import ADVANTAGE_ESTIMATORS, estimate_advantages, group_moments, has_contrast
from rayrlhf.algorithms.estimator import AdvantageInputs
from rayrlhf.algorithms.reward_shaping import token_rewards
from tests.algorithms.batches import Batch, batches

GROUPED = ["grpo", "dr_grpo", "rloo"]
ONE_VOTE = [*GROUPED, "grpo_leave_one_out", "maxrl", "gdpo", "reinforce++-baseline"]
ALONE = [*GROUPED, "grpo_leave_one_out", "opo", "maxrl", "gdpo", "reinforce++-baseline"]
WITHOUT_CRITIC = [name for name, method in ADVANTAGE_ESTIMATORS.items() if not method.critic]


def inputs_of(batch: Batch, scores: Tensor, groups: Tensor, kl: Tensor | None = None, beta: float = 0.0) -> AdvantageInputs:
    earned = token_rewards(kl, scores, batch.mask, beta)
    baselines = torch.linspace(-1, 1, len(scores), dtype=torch.float64)
    parts = (scores[:, None], torch.ones(1, dtype=torch.float64))
    return AdvantageInputs(earned.rewards, scores, groups, batch.mask, earned.value_mask, None, baselines, None, *parts)


def advantages_of(
    name: str, inputs: AdvantageInputs, *, gamma: float = 1.0, skip_masked: bool = True, whitened: bool | None = None
) -> Tensor:
    result = estimate_advantages(name, inputs, gamma=gamma, lam=0.5, skip_masked=skip_masked, whitened=whitened)
    assert result.returns is None
    return result.advantages


@st.composite
def grouped(draw: st.DrawFn, *, size: int = 4) -> tuple[Batch, Tensor, Tensor]:
    """Whole groups of `size` consecutive responses, some of which may have failed (NaN)."""
    count = draw(st.integers(1, 3)) * size
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lengths = torch.randint(1, 8, (count,), generator=generator)
    scores = torch.randn(count, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        scores[torch.rand(count, generator=generator) < 0.3] = torch.nan
    return Batch(torch.arange(7) < lengths[:, None], generator), scores, torch.arange(count) // size


@given(grouped())
def test_grpo_and_dr_grpo_are_those_of_trls_trainer(drawn: tuple[Batch, Tensor, Tensor]) -> None:
    from trl import GRPOTrainer

    from tests.algorithms.trl_group import trl_experience

    batch, scores, groups = drawn
    for name, scale in (("grpo", "group"), ("dr_grpo", "none")):
        theirs = trl_experience(GRPOTrainer, scores, batch.mask, batch.logprobs(), scale_rewards=scale)["advantages"]
        ours = advantages_of(name, inputs_of(batch, scores, groups))
        torch.testing.assert_close(ours[:, 0], theirs, atol=1e-5, rtol=1e-5)
        assert torch.equal(ours, torch.where(batch.mask, ours[:, :1], 0.0))


@given(grouped(), st.sampled_from([0.0, 0.3]))
def test_rloo_is_that_of_trls_trainer_with_the_kl_in_the_reward(drawn: tuple[Batch, Tensor, Tensor], beta: float) -> None:
    from trl import RLOOTrainer

    from tests.algorithms.trl_group import trl_experience

    batch, scores, groups = drawn
    policy, reference = batch.logprobs(), batch.logprobs()
    theirs = trl_experience(RLOOTrainer, scores, batch.mask, policy, reference=reference, beta=beta)["advantages"]
    ours = advantages_of("rloo", inputs_of(batch, scores, groups, policy - reference, beta))
    torch.testing.assert_close(ours[:, 0], theirs, atol=1e-5, rtol=1e-5)


@given(grouped(), st.sampled_from(GROUPED))
def test_the_advantages_of_a_group_sum_to_zero(drawn: tuple[Batch, Tensor, Tensor], name: str) -> None:
    batch, scores, groups = drawn
    first_tokens = advantages_of(name, inputs_of(batch, scores, groups))[:, 0]
    for group in groups.unique():
        assert abs(first_tokens[groups == group].sum()) < 1e-9


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_a_failed_response_counts_as_never_sampled(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    batch = Batch(torch.ones(5, 3, dtype=torch.bool), generator)
    scores, groups = torch.tensor([1.0, torch.nan, 2.0, 4.0, 5.0]).double(), torch.tensor([0, 0, 0, 1, 1])
    inputs = inputs_of(batch, scores, groups)
    kept = torch.tensor([0, 2, 3, 4])
    assert inputs.baselines is not None
    assert inputs.parts is not None
    without = AdvantageInputs(
        inputs.rewards[kept],
        scores[kept],
        groups[kept],
        batch.mask[kept],
        inputs.value_mask[kept],
        None,
        inputs.baselines[kept],
        None,
        inputs.parts[kept],
        inputs.part_weights,
    )
    advantages = advantages_of(name, inputs)
    torch.testing.assert_close(advantages[kept], advantages_of(name, without))
    assert not advantages[1].any()


@pytest.mark.parametrize("name", ALONE)
def test_a_group_of_one_known_response_teaches_nothing(name: str) -> None:
    batch = Batch(torch.ones(4, 2, dtype=torch.bool), torch.Generator())
    scores = torch.tensor([3.0, torch.nan, torch.nan, torch.nan]).double()
    inputs = inputs_of(batch, scores, torch.tensor([0, 0, 1, 1]))
    assert not advantages_of(name, inputs, whitened=False).any()


def test_tables_computed_by_hand() -> None:
    # Two prompts of three and two responses; scores 1, 2, 6 and 4, 4; KL 0.5 a token at beta 0.2 costs 0.1 a token.
    batch = Batch(torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1], [1, 0]]).bool(), torch.Generator())
    scores, groups = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0]).double(), torch.tensor([7, 7, 7, 2, 2])
    plain = inputs_of(batch, scores, groups)
    with_kl = inputs_of(batch, scores, groups, torch.full((5, 2), 0.5).double(), 0.2)
    spread = 7**0.5  # of 1, 2, 6 around 3, unbiased
    tables = {
        "grpo": [-2 / (spread + 1e-4), -1 / (spread + 1e-4), 3 / (spread + 1e-4), 0.0, 0.0],
        "dr_grpo": [-2.0, -1.0, 3.0, 0.0, 0.0],
        "rloo": [1 - 4.0, 2 - 3.5, 6 - 1.5, 0.0, 0.0],
        "grpo_leave_one_out": [-3 / (8**0.5 + 1e-4), -1.5 / (12.5**0.5 + 1e-4), 4.5 / (0.5**0.5 + 1e-4), 0.0, 0.0],
        "opo": [1 - 3.2, 2 - 3.2, 6 - 3.2, 0.0, 0.0],  # lengths 2, 1, 2: (2 + 2 + 12) / 5
        "maxrl": [-2 / 3, -1 / 3, 1.0, 0.0, 0.0],
        "reinforce": scores.tolist(),
        "reinforce++-baseline": [-2.0, -1.0, 3.0, 0.0, 0.0],
        "remax": [2.0, 2.5, 6.0, 3.5, 3.0],  # baselines -1, -0.5, 0, 0.5, 1
    }
    for name, expected in tables.items():
        assert advantages_of(name, plain, whitened=False)[:, 0].tolist() == pytest.approx(expected, abs=1e-12), name
    to_go = [[0.8, 0.9], [1.9, 0.0], [5.8, 5.9], [3.8, 3.9], [3.9, 0.0]]
    assert advantages_of("reinforce", with_kl).tolist() == [pytest.approx(row, abs=1e-12) for row in to_go]
    baseline = [3.0, 3.0, 3.0, 4.0, 4.0]
    own = advantages_of("reinforce++-baseline", with_kl, whitened=False)
    for row, rewards, mean in zip(own, to_go, baseline, strict=True):
        assert row[0].item() == pytest.approx(rewards[0] - mean, abs=1e-12)
    assert advantages_of("rloo", with_kl)[:2, 0].tolist() == pytest.approx([0.8 - (1.9 + 5.8) / 2, 1.9 - (0.8 + 5.8) / 2])
    discounted = advantages_of("reinforce", with_kl, gamma=0.5)
    assert discounted[0].tolist() == pytest.approx([-0.1 + 0.5 * 0.9, 0.9])


@given(batches(), st.sampled_from(["reinforce", "remax"]), st.floats(0, 1))
def test_rewards_to_go_skip_tool_tokens_and_stay_off_them(batch: Batch, name: str, gamma: float) -> None:
    scores, kl = batch.scores(), batch.floats()
    inputs = inputs_of(batch, scores, torch.arange(len(scores)), kl, 0.1)
    ours = advantages_of(name, inputs, gamma=gamma)
    assert inputs.baselines is not None
    for row in range(len(scores)):
        places = batch.mask[row].nonzero().flatten().tolist()
        running = 0.0
        for step, place in enumerate(reversed(places)):
            running = gamma * running - 0.1 * kl[row, place].item() + (scores[row].item() if step == 0 else 0.0)
            baseline = inputs.baselines[row].item() if name == "remax" else 0.0
            assert ours[row, place].item() == pytest.approx(running - baseline, abs=1e-9)
    assert not ours[~batch.mask].any()


@given(grouped(), st.sampled_from(WITHOUT_CRITIC))
def test_order_padding_and_what_stands_behind_a_mask_change_nothing(drawn: tuple[Batch, Tensor, Tensor], name: str) -> None:
    batch, scores, groups = drawn
    scores = scores.nan_to_num(nan=0.5)
    kl = batch.floats()
    inputs = inputs_of(batch, scores, groups, kl, 0.1)
    advantages = advantages_of(name, inputs)
    order = torch.randperm(len(scores), generator=batch.generator)
    assert inputs.baselines is not None
    assert inputs.parts is not None
    mixed = AdvantageInputs(
        batch.behind_nan(inputs.rewards)[order], scores[order], 9 - groups[order], batch.mask[order],
        inputs.value_mask[order], None, inputs.baselines[order], None, inputs.parts[order], inputs.part_weights,
    )  # fmt: skip
    torch.testing.assert_close(advantages_of(name, mixed), advantages[order], atol=1e-9, rtol=1e-9)
    wide = AdvantageInputs(
        pad(inputs.rewards, (0, 2), value=torch.nan), scores, groups, pad(batch.mask, (0, 2)),
        pad(inputs.value_mask, (0, 2)), None, inputs.baselines, None, inputs.parts, inputs.part_weights,
    )  # fmt: skip
    torch.testing.assert_close(advantages_of(name, wide)[:, :-2], advantages, atol=1e-9, rtol=1e-9)


@given(grouped())
def test_reinforce_plus_plus_is_reinforce_whitened_over_the_step(drawn: tuple[Batch, Tensor, Tensor]) -> None:
    batch, scores, groups = drawn
    inputs = inputs_of(batch, scores.nan_to_num(nan=0.5), groups)
    plain, white = advantages_of("reinforce", inputs), advantages_of("reinforce++", inputs)
    chosen = plain[batch.mask]
    if len(chosen) > 1:
        torch.testing.assert_close(white[batch.mask], (chosen - chosen.mean()) / (chosen.var() + 1e-8).sqrt())


@given(grouped())
def test_moments_are_those_of_each_group_alone(drawn: tuple[Batch, Tensor, Tensor]) -> None:
    _, scores, groups = drawn
    size, mean, std = group_moments(scores, groups)
    contrast = has_contrast(scores, groups)
    for group in groups.unique():
        rows = groups == group
        known = scores[rows][~scores[rows].isnan()]
        assert (size[rows] == len(known)).all()
        torch.testing.assert_close(mean[rows], known.mean().expand(4), equal_nan=True)
        torch.testing.assert_close(
            std[rows], (known.std() if len(known) > 1 else mean.new_tensor(torch.nan)).expand(4), equal_nan=True
        )
        assert (contrast[rows] == (len(known.unique()) > 1)).all()


def test_remax_without_greedy_scores_is_an_error() -> None:
    batch = Batch(torch.ones(1, 1, dtype=torch.bool), torch.Generator())
    mask = batch.mask
    bare = AdvantageInputs(torch.ones(1, 1), torch.ones(1), torch.zeros(1, dtype=torch.long), mask, mask, None)
    with pytest.raises(ValueError, match="needs the scores of greedy responses"):
        advantages_of("remax", bare)


@given(grouped(), st.integers(0, 2**31))
@pytest.mark.parametrize("name", ONE_VOTE)
def test_parts_of_one_response_share_its_vote(name: str, drawn: tuple[Batch, Tensor, Tensor], seed: int) -> None:
    batch, scores, groups = drawn
    counts = torch.randint(1, 4, (len(scores),), generator=torch.Generator().manual_seed(seed))
    rows = torch.repeat_interleave(torch.arange(len(scores)), counts)
    once = inputs_of(batch, scores, groups)
    votes = (1.0 / counts.double())[rows]
    fields = (once.rewards, once.scores, once.groups, once.mask, once.value_mask)
    assert once.parts is not None
    split = AdvantageInputs(*(field[rows] for field in fields), None, None, votes, once.parts[rows], once.part_weights, rows)
    expected = advantages_of(name, once, whitened=False)[rows]
    torch.testing.assert_close(advantages_of(name, split, whitened=False), expected, atol=1e-6, rtol=1e-6)


@given(st.integers(0, 2**31), st.booleans())
@pytest.mark.parametrize("name", ["rloo", "grpo_leave_one_out"])
def test_a_part_with_a_reward_of_its_own_is_compared_with_the_other_samples_alone(name: str, seed: int, one_vote: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    samples = torch.repeat_interleave(torch.arange(8), torch.randint(1, 4, (8,), generator=random))
    samples = samples[torch.randperm(len(samples), generator=random)]
    groups, rewards = samples // 4, torch.randn(len(samples), generator=random, dtype=torch.float64)
    votes = 1 / samples.bincount()[samples].double() if one_vote else torch.ones(len(samples), dtype=torch.float64)
    mask = torch.ones(len(samples), 1, dtype=torch.bool)
    inputs = AdvantageInputs(rewards[:, None], rewards, groups, mask, mask, None, votes=votes, samples=samples)
    ours = advantages_of(name, inputs, whitened=False)[:, 0]
    for row, reward in enumerate(rewards):
        others = (groups == groups[row]) & (samples != samples[row])
        weights = votes[others]
        mean = (weights * rewards[others]).sum() / weights.sum()
        spread = ((weights * (rewards[others] - mean).square()).sum() / (weights.sum() - 1)).sqrt() + 1e-4
        expected = (reward - mean) / (spread if name == "grpo_leave_one_out" else 1)
        assert ours[row].item() == pytest.approx(expected.item(), abs=1e-9, rel=1e-9)


@given(grouped())
def test_a_response_is_compared_with_mean_and_spread_of_the_others(drawn: tuple[Batch, Tensor, Tensor]) -> None:
    batch, scores, groups = drawn
    ours = advantages_of("grpo_leave_one_out", inputs_of(batch, scores, groups))[:, 0]
    for row in range(len(scores)):
        others = scores[(groups == groups[row]) & (torch.arange(len(scores)) != row) & ~scores.isnan()]
        known = not scores[row].isnan() and len(others) > 1
        expected = (scores[row] - others.mean()) / (others.std() + 1e-4) if known else torch.zeros(())
        assert ours[row].item() == pytest.approx(expected.item(), abs=1e-6, rel=1e-6)


def test_others_that_are_all_equal_have_no_spread_to_divide_by() -> None:
    batch = Batch(torch.ones(4, 1, dtype=torch.bool), torch.Generator())
    scores = torch.tensor([0.1, 0.1, 0.1, 1.0]).double()
    ours = advantages_of("grpo_leave_one_out", inputs_of(batch, scores, torch.zeros(4, dtype=torch.long)))[:, 0]
    others = torch.tensor([0.1, 0.1, 1.0]).double().std().item() + 1e-4
    assert ours.tolist() == pytest.approx([-0.3 / others] * 3 + [0.9])


@given(grouped(), st.integers(1, 3))
def test_gdpo_is_the_normalization_of_each_reward_in_trls_trainer(drawn: tuple[Batch, Tensor, Tensor], count: int) -> None:
    from trl import GRPOTrainer

    from tests.algorithms.trl_group import trl_experience

    batch, scores, groups = drawn
    scores = scores.nan_to_num(nan=0.5)
    parts = torch.randn(len(scores), count, generator=batch.generator, dtype=torch.float64).round(decimals=1)
    weights = torch.tensor([1.0, 0.5, -2.0][:count], dtype=torch.float64)
    names = [str(index) for index in range(count)]
    theirs = trl_experience(
        GRPOTrainer, parts, batch.mask, batch.logprobs(), multi_objective_aggregation="normalize_then_sum",
        reward_weights=weights, reward_funcs=[None] * count, reward_func_names=names,
    )["advantages"]  # fmt: skip
    ours = advantages_of("gdpo", replace(inputs_of(batch, scores, groups), parts=parts, part_weights=weights))
    torch.testing.assert_close(ours[:, 0], theirs, atol=1e-5, rtol=1e-5)


def test_two_rewards_that_cancel_in_the_sum_still_teach_gdpo() -> None:
    batch = Batch(torch.ones(4, 1, dtype=torch.bool), torch.Generator())
    groups = torch.tensor([0, 0, 0, 0])
    parts = torch.tensor([[1.0, 0.0], [0.0, 4.0], [0.0, 4.0], [1.0, 0.0]]).double()
    weights = torch.tensor([4.0, 1.0]).double()
    inputs = replace(inputs_of(batch, parts @ weights, groups), parts=parts, part_weights=weights)
    assert not advantages_of("grpo", inputs).any()
    assert advantages_of("gdpo", inputs)[:, 0].sign().tolist() == [1, -1, -1, 1]


def test_gdpo_without_the_values_of_each_reward_is_an_error() -> None:
    batch = Batch(torch.ones(2, 1, dtype=torch.bool), torch.Generator())
    inputs = inputs_of(batch, torch.tensor([0.0, 1.0]).double(), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="needs the values of each reward"):
        advantages_of("gdpo", replace(inputs, parts=None))
