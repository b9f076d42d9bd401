"""Pools leave room for the tasks that read and write, on every machine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.batch_inference.stage_resources import TASK_CPUS, TASKS, stage_resources
from rayrlhf.config.batch_inference import GenerateSection, PipelineSection
from rayrlhf.errors import UserError


def divide(cpus, gpus, *, generating=True, generate=None, **pipeline):
    return stage_resources(PipelineSection(**pipeline), generate or GenerateSection(), cpus, gpus, generating=generating)


@given(st.integers(1, 256), st.booleans(), st.booleans())
def test_what_is_asked_for_leaves_room_for_the_tasks(cpus, gpu, generating):
    share = divide(float(cpus), float(gpu), generating=generating)
    asked = share.generators * share.generator_cpus + share.scorers * share.scorer_cpus
    assert asked + TASKS * TASK_CPUS <= cpus + 1e-6
    assert share.scorers >= 1
    assert share.scorer_cpus > 0
    assert share.generators == generating


def test_two_cores_score_on_both_when_nothing_is_generated():
    assert divide(2.0, 0.0, generating=False).scorers == 2


def test_two_cores_generate_on_both_while_a_scorer_runs_next_to():
    share = divide(2.0, 0.0)
    assert (share.generators, share.generator_threads, share.scorers) == (1, 2, 1)


def test_a_generator_takes_the_gpus_of_its_tensor_parallel_group():
    share = divide(16.0, 8.0, generators=4, generate=GenerateSection(tensor_parallel_size=2))
    assert (share.generator_gpus, share.generator_cpus) == (2.0, 1.0)


@pytest.mark.parametrize("found", [0.5, 1.0])
def test_a_generator_with_fewer_gpus_than_its_tensor_parallel_group_is_refused(found):
    pair = GenerateSection(tensor_parallel_size=2)
    with pytest.raises(UserError, match=rf"^pipeline\.generator_gpus: .* expected 2 \(.*\), found {found:g}$"):
        divide(16.0, 8.0, generate=pair, generator_gpus=found)
    assert divide(16.0, 8.0, generate=pair, generator_gpus=0.0).generator_gpus == 0.0
    assert divide(16.0, 8.0, generator_gpus=0.5).generator_gpus == 0.5


@pytest.mark.parametrize(
    ("cpus", "gpus", "settings"),
    [(2.0, 0.0, {"generators": 8, "generator_cpus": 1.0}), (1.0, 0.0, {"scorers": 16}), (64.0, 2.0, {"generators": 4})],
)
def test_more_than_there_is_is_refused_with_both_numbers(cpus, gpus, settings):
    with pytest.raises(UserError, match="do not fit into"):
        divide(cpus, gpus, **settings)
