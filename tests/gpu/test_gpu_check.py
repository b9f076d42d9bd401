"""The steps of `rayrlhf doctor --gpu`, one test each: `pytest -m gpu -n 0 tests/gpu`."""

import pytest

from rayrlhf.errors import UserError
from rayrlhf.tools.gpu_check.check_runner import STEPS, run_step, step_lines, usable_gpus


@pytest.fixture(scope="module")
def gpus():
    try:
        return usable_gpus()
    except UserError as error:
        return pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_step(step, gpus):
    result = run_step(step, "cuda", gpus)
    print(step_lines(result))
    if result.status == "skipped":
        pytest.skip(result.reason)
    assert result.status == "passed", step_lines(result)
