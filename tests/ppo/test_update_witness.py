"""What the ranks say they trained on is compared with the driver's own batch; a planted fault ends the run with its sample."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import rayrlhf.engines.train.update as engine_update
from rayrlhf.config.algorithm import ParitySection
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import SampleKey
from rayrlhf.engines.objectives.base import responses_under
from rayrlhf.engines.train.plan import TrainedRows, UpdatePlan
from rayrlhf.errors import AlarmError
from rayrlhf.ppo.experience import Experience
from rayrlhf.ppo.pair_batch import TrainedBatch
from rayrlhf.ppo.update_objectives import plan_update
from rayrlhf.ppo.update_witness import BatchFacts, UpdateWitness, _Place
from tests.engines.train.test_engine import BOTH, engine_of
from tests.engines.training import random_batch, random_sequences

ROWS, STEP = 6, 2
REQUIRED = ["model.path=none", "reward.functions=[{name: length}]", "data.train.path=none", "train.mini_batch_size=4"]

pytestmark = pytest.mark.usefixtures("alone")


def experience():
    batch = random_batch(random_sequences(ROWS))
    keys = [SampleKey(STEP, row // 2, row % 2) for row in range(ROWS)]
    return Experience(batch, keys, torch.zeros(ROWS), {}, torch.zeros(ROWS))


def facts_of(made):
    return BatchFacts(TrainedBatch(made.batch, made.keys, made.learnable_groups))


def witness(*overrides):
    return UpdateWitness(load_config(PPOConfig, None, [*REQUIRED, "train.epochs=2", *overrides]))


def plan(made):
    return plan_update(made.learnable_groups, 2, 4, 1, STEP)


def updated(llama, plant=lambda patch: None, *, made=None, parity=None, change=None, **settings):
    """The report of a real update on one rank, with a fault planted in it."""
    made = made or experience()
    engine = engine_of(llama, micro_batch_size=2, parity=parity or ParitySection(), **settings)
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        planned = plan(made)
        return engine.update(made.batch, planned if change is None else UpdatePlan(change(planned.epochs)), BOTH)


def checked(llama, *planted, watch=None, **settings):
    made = experience()
    (watch or witness()).check(STEP, "policy", [updated(llama, *planted, **settings)], facts_of(made))


@pytest.mark.parametrize("parity", [{}, {"mini_batch_means": True}, {"no_accumulation": True}])
def test_an_update_without_a_fault_passes_also_with_the_means_of_trl(llama, parity):
    means = [f"algorithm.parity={{{', '.join(f'{name}: true' for name in parity)}}}"] if parity else []
    checked(llama, watch=witness(*means), parity=ParitySection(**parity))


def test_rows_without_a_token_to_train_on_are_in_no_step(llama):
    made = experience()
    made.batch.arrays["action_mask"][3] = made.batch.arrays["value_mask"][3] = False
    report = updated(llama, made=made)
    assert {row for part in report.trained for row in part.rows} == set(range(ROWS)) - {3}
    witness().check(STEP, "policy", [report], facts_of(made))


def without_first_row(epochs):
    return [[[row for row in rows if row != 1] for rows in epoch] for epoch in epochs]


def doubled_row(epochs):
    return [epochs[0], [[*rows[:-1], 5] if 5 not in rows else rows for rows in epochs[1]]]


def counts_one_more(patch):
    real = engine_update._counts
    patch.setattr(engine_update, "_counts", lambda *given: {name: count + 1 for name, count in real(*given).items()})


def divides_by_half(patch):
    real = engine_update.weighted_loss
    halved = lambda parts, counts: real(parts, {name: count / 2 for name, count in counts.items()})  # noqa: E731
    patch.setattr(engine_update, "weighted_loss", halved)


def exchanges_arrays(patch):
    real = engine_update.TrainingBatch.select

    def select(batch, rows):
        found = real(batch, rows)
        return replace(found, arrays=found.arrays | {"advantages": found.arrays["advantages"][::-1].copy()})

    patch.setattr(engine_update.TrainingBatch, "select", select)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ({"change": without_first_row}, r"sample 1 of prompt 0 is in 0 optimizer steps of the policy in epoch 1, expected 1"),
        ({"change": doubled_row}, r"sample \d of prompt \d is in [02] optimizer steps of the policy in epoch 2, expected 1"),
        ({"change": lambda epochs: epochs[:1]}, r"the policy trained 1 epochs, expected 2"),
        ({"plant": counts_one_more}, r"in optimizer step 1 of the policy has a loss divided by \d+ \(\w+\), expected \d+"),
        ({"plant": divides_by_half}, r"in optimizer step 1 of the policy has a loss of \S+, expected "),
        ({"plant": exchanges_arrays}, r"of the policy was trained with other tokens, masks or advantages than its own"),
    ],
    ids=["lost", "doubled", "short", "wrong denominator", "wrong division", "exchanged advantages"],
)
def test_a_fault_in_the_engine_is_named_with_step_and_sample(llama, harm, message):
    with pytest.raises(AlarmError, match=f"^step 3: .*{message}"):
        checked(llama, **harm)


def ranks(report, *shares):
    """The report split over ranks, by data rank and the rows each of them has."""
    return [
        replace(report, data_rank=rank, trained=[part for part in report.trained if set(part.rows) <= set(rows)])
        for rank, rows in shares
    ]


def test_ranks_share_the_samples_and_each_must_have_its_own(llama):
    report, facts, everything = updated(llama), facts_of(experience()), range(ROWS)
    witness().check(STEP, "policy", ranks(report, (0, everything), (1, ())), facts)
    witness().check(STEP, "policy", ranks(report, (0, everything), (0, everything)), facts)  # two that share columns
    with pytest.raises(AlarmError, match="is in 2 optimizer steps of the policy in epoch 1"):
        witness("train.mini_batch_size=16").check(STEP, "policy", ranks(report, (0, everything), (1, everything)), facts)
    with pytest.raises(AlarmError, match="is computed by some of the policy ranks that share it, expected all"):
        witness().check(STEP, "policy", ranks(report, (0, everything), (0, ())), facts)


def test_an_update_that_was_made_twice_or_left_out_is_found_by_the_number_of_steps(llama):
    report, facts, watch = updated(llama), facts_of(experience()), witness()
    watch.check(STEP, "policy", [report], facts)
    state = watch.state()
    assert state == {"policy": 4}
    watch.check(STEP + 1, "policy", [replace(report, steps_before=4)], facts)
    with pytest.raises(AlarmError, match="step 4: the policy had taken 4 optimizer steps before it, expected 8"):
        watch.check(STEP + 1, "policy", [replace(report, steps_before=4)], facts)
    watch.load_state(state)  # a replay after a loss begins where the committed state ended
    watch.check(STEP + 1, "policy", [replace(report, steps_before=4)], facts)
    watch.load_state(None)  # of a checkpoint that does not have it
    for role in ("policy", "critic"):
        watch.check(STEP + 1, role, [replace(report, steps_before=70)], facts)
        with pytest.raises(AlarmError, match=f"the {role} had taken 70 optimizer steps before it, expected 74"):
            watch.check(STEP + 1, role, [replace(report, steps_before=70)], facts)
    assert watch.state() is None


def test_an_early_stop_leaves_out_whole_epochs(llama):
    report, facts = updated(llama), facts_of(experience())
    cut = replace(report, epochs=1, stopped_early=True, trained=[part for part in report.trained if part.mini_batch < 2])
    witness().check(STEP, "policy", [cut], facts)
    with pytest.raises(AlarmError, match="is in 1 optimizer steps of the policy in epoch 2, expected 0"):
        witness().check(STEP, "policy", [replace(report, epochs=1, stopped_early=True)], facts)


def test_losses_that_cancel_out_may_differ_by_the_rounding_of_each():
    made = experience()
    denominators, rows = {"action_mask": float(made.batch.arrays["action_mask"].sum())}, tuple(range(ROWS))
    facts = facts_of(made)
    total, wrong = 7.3151 - 0.01 * 731.312, 1.0
    part = TrainedRows(0, rows, facts.fingerprints, denominators, {"action_mask": total}, {"action_mask": 14.6}, 0.0)
    for error in (7e-6, wrong):
        found = part._replace(loss=(total + error) / denominators["action_mask"])
        if error == wrong:
            with pytest.raises(AlarmError, match="has a loss of"):
                witness("train.mini_batch_size=64")._check_mini_batch(_Place(STEP, "policy", 1), [found], facts)
        else:
            witness("train.mini_batch_size=64")._check_mini_batch(_Place(STEP, "policy", 1), [found], facts)


def test_denominators_are_positions_or_responses_under_a_mask():
    made = experience()
    made.batch.arrays["action_mask"][2] = False
    facts, rows = facts_of(made), np.arange(ROWS)
    assert facts.count("action_mask", rows) == made.batch.arrays["action_mask"].sum()
    assert facts.count(responses_under("action_mask"), rows) == ROWS - 1
