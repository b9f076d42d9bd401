"""Each check on a run that shows its sign and on one that is close to it and must not."""

import math

import pytest

from rayrlhf.observe.diagnostics import CHECKS, Diagnosis, findings

HEALTHY = {
    "objective/kl": 4.0,
    "policy/entropy_avg": 1.2,
    "ppo/val/var_explained": 0.3,
    "val/ratio_first": 1.0,
    "objective/scores": 0.4,
    "ppo/std_scores": 0.2,
    "frac_reward_zero_std": 0.3,
    "tokens/responses_len_mean": 60.0,
    "val/num_eos_tokens": 60.0,
    "sampling/sampling_logp_difference/mean": 0.03,
    "sampling/staleness/max": 0.0,
    "time_share/other": 0.02,
    "memory/peak_gib": 10.0,
    "memory/limit_gib": 24.0,
}
STEPS = 20


def run(**changes):
    """A run of 20 steps of 64 episodes; a change is a function of the share of the run that is over, `/` written as `__`."""
    rows = []
    for step in range(1, STEPS + 1):
        own = {name.replace("__", "/"): change((step - 1) / (STEPS - 1)) for name, change in changes.items()}
        rows.append({"step": step, "episode": 64.0 * step, **HEALTHY, **own})
    return rows


def with_evaluations(rows, *scores):
    every = STEPS // (len(scores) - 1)
    found = [{"step": 0, "evaluation/score": scores[0]}]
    for row in rows:
        found.append(row)
        if row["step"] % every == 0:
            found.append({"step": row["step"], "evaluation/score": scores[row["step"] // every]})
    return found


def rising(to):
    return lambda done: HEALTHY["objective/scores"] + done * (to - HEALTHY["objective/scores"])


SICK = {
    "kl_blow_up": run(objective__kl=lambda done: 4 + 60 * done),
    "kl_negative": run(objective__kl=lambda done: -3.0),
    "entropy_collapse": run(policy__entropy_avg=lambda done: 1.2 * (1 - done) + 0.01),
    "critic_not_learning": run(ppo__val__var_explained=lambda done: -0.2),
    "first_ratio": run(val__ratio_first=lambda done: 1.1),
    "reward_hacking": with_evaluations(run(objective__scores=rising(0.8)), 0.4, 0.5, 0.3),
    "reward_model_by_chance": run(reward_model__chance_probability=lambda done: 0.4),
    "length_explosion": run(tokens__responses_len_mean=lambda done: 60 + 120 * done),
    "dead_reward": run(ppo__std_scores=lambda done: 0.0),
    "truncated_responses": run(val__num_eos_tokens=lambda done: 20.0),
    "sampler_mismatch": run(sampling__sampling_logp_difference__mean=lambda done: 0.3),
    "update_lost": run(weight_sync__update_arrived=lambda done: 0.03),
    "stale_rollouts": run(sampling__staleness__max=lambda done: 2.0),
    "idle_actors": run(time_share__other=lambda done: 0.4),
    "memory_limit": run(memory__peak_gib=lambda done: 23.0),
}
WELL = {
    "kl_blow_up": run(objective__kl=lambda done: 4 + 14 * done),
    "kl_negative": run(objective__kl=lambda done: -3.0 if done < 0.9 else -0.5),
    "entropy_collapse": run(policy__entropy_avg=lambda done: 1.2 * (1 - done) + 0.15),
    "critic_not_learning": run(ppo__val__var_explained=lambda done: -0.2 if done < 0.7 else 0.05),
    "first_ratio": run(val__ratio_first=lambda done: 1.01),
    "reward_hacking": with_evaluations(run(objective__scores=rising(0.8)), 0.4, 0.5, 0.6),
    "reward_model_by_chance": run(reward_model__chance_probability=lambda done: 0.01),
    "length_explosion": run(tokens__responses_len_mean=lambda done: 60 + 50 * done),
    "dead_reward": run(ppo__std_scores=lambda done: 0.01, frac_reward_zero_std=lambda done: 0.85),
    "truncated_responses": run(val__num_eos_tokens=lambda done: 33.0),
    "sampler_mismatch": run(sampling__sampling_logp_difference__mean=lambda done: 0.08),
    "update_lost": run(weight_sync__update_arrived=lambda done: 0.6),
    "stale_rollouts": [row | {"sampling/staleness/max": 2.0, "sampling/staleness/limit": 2.0} for row in run()],
    "idle_actors": run(time_share__other=lambda done: 0.2),
    "memory_limit": run(memory__peak_gib=lambda done: 21.0),
}


def names(rows):
    return {finding.name for finding in findings(rows)}


def test_every_check_has_both_runs():
    assert set(SICK) == set(WELL) == {check.name for check in CHECKS}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_shows_its_sign_and_no_other(name):
    assert names(SICK[name]) == {name}


@pytest.mark.parametrize("name", WELL)
def test_a_run_that_is_only_close_to_it_shows_nothing(name):
    assert names(WELL[name]) == set()


def test_held_out_scores_may_fall_where_training_scores_do_not_rise():
    assert names(with_evaluations(run(), 0.4, 0.5, 0.3)) == set()


def test_groups_without_contrast_are_a_dead_reward_too():
    assert names(run(frac_reward_zero_std=lambda done: 0.97)) == {"dead_reward"}


@pytest.mark.parametrize("name", SICK)
def test_missing_numbers_and_null_and_short_runs_say_nothing(name):
    empty = [{"step": row["step"]} | dict.fromkeys(row.keys() - {"step"}) for row in SICK[name]]
    assert findings(empty) == findings([]) == findings(SICK[name][:0]) == []
    broken = [{key: (math.nan if key != "step" else value) for key, value in row.items()} for row in SICK[name]]
    assert findings(broken) == []


def test_a_finding_says_since_when_with_numbers_and_what_to_do():
    (finding,) = findings(SICK["kl_negative"])
    assert finding.since_step == STEPS - 2
    assert "-3.00 nats" in finding.evidence
    assert str(finding).startswith("warning: kl negative since step 18: ")
    assert all(check.remedy.endswith(".") for check in CHECKS)


def test_alarms_come_before_warnings():
    rows = run(objective__kl=lambda done: -3.0, ppo__std_scores=lambda done: 0.0)
    assert [finding.severity for finding in findings(rows)] == ["alarm", "warning"]


def test_a_finding_is_fresh_once_and_again_after_it_went_away():
    watched, fresh = Diagnosis(), []
    for step, gap in enumerate([0.03, 0.3, 0.3, 0.3, 0.3, 0.01, 0.3, 0.3, 0.3], start=1):
        watched.add(step, {"sampling/sampling_logp_difference/mean": gap})
        fresh += [step] * len(watched.fresh)
    assert fresh == [4, 9]
    assert watched.metrics == {"alarm/sampler_mismatch": 1.0}


def test_what_a_resumed_run_showed_before_is_not_fresh():
    watched = Diagnosis()
    watched.load(SICK["dead_reward"])
    assert [finding.name for finding in watched.found] == ["dead_reward"]
    watched.add(STEPS + 1, HEALTHY | {"ppo/std_scores": 0.0})
    assert watched.fresh == []


def test_a_long_run_is_looked_at_by_its_start_and_its_end():
    watched = Diagnosis()
    for step in range(1000):
        watched.add(step, HEALTHY | {"objective/kl": 4.0 + step / 15, "episode": 64.0 * (step + 1)})
    assert [finding.name for finding in watched.found] == ["kl_blow_up"]
    assert len(watched._first) + len(watched._last) == 440


def test_the_rows_kept_share_their_names_because_the_names_are_most_of_a_row():
    watched = Diagnosis()
    for step in range(2):
        watched.add(step, {f"time/{phase}": 1.0 for phase in ("generate", "update")})
    one, other = ([id(name) for name in row] for row in watched._first)
    assert one == other
