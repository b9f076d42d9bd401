"""The lines of a dry run about each model."""

import pytest

from rayrlhf.actors.role_specs import train_spec
from rayrlhf.ppo.run_models import describe_checks
from tests.ppo.runs import run_config


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [
        ([], "samples may be packed and share prefixes"),
        (["train.share_prefixes=off"], "samples are padded, not packed, prefixes are not shared: train.share_prefixes is off"),
        (["placement.policy={ranks: 2, sequence_parallel: 2}"], "not shared: ranks share rows (sequence_parallel)"),
        (["algorithm.parity.mini_batch_means=true"], "not shared: micro-batches are consecutive samples (algorithm.parity)"),
    ],
    ids=str,
)
def test_a_dry_run_tells_whether_prefixes_are_shared_as_the_engine_does(tmp_path, settings, outcome):
    config = run_config(tmp_path, *settings)
    (line,) = describe_checks(config)
    assert line.endswith(outcome)
    assert train_spec(config, "policy").unshared in line


def test_the_roles_tell_on_their_own_why_they_share_nothing(tmp_path):
    config = run_config(
        tmp_path, "critic.model.path=builtin:tiny?layers=1&hidden=64&context=64", "critic.kind=separate",
        "placement.critic={ranks: 2, sequence_parallel: 2}",
    )  # fmt: skip
    policy, critic = describe_checks(config)
    assert policy.endswith("share prefixes")
    assert critic.startswith("critic model: ")
    assert critic.endswith("(sequence_parallel)")
