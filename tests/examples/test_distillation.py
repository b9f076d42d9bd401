"""The chain of `examples/distillation`: what a student learns from its teacher, over three seeds (by hand: `-m nightly -s`)."""

import json
from pathlib import Path

import pytest

from examples.distillation.sums import adds_up
from rayrlhf.config.pipelines import ChainConfig
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.pipelines.chain.run_chain import plan_chain, run_chain
from tests.examples.chains import seeded_chain

ROOT = Path(__file__).parents[2]


def chain_of(seed: int, root: Path) -> ChainConfig:
    """The chain with other start weights, other rows of each split and other draws."""
    return seeded_chain(ROOT / "examples" / "distillation" / "chain.yaml", seed, root, "builtin:tiny?", "builtin:summands?")


def curve_of(folder: Path) -> dict[int, float]:
    """Held-out accuracy by step."""
    return {row["step"]: row["evaluation/score"] for row in read_metrics(folder) if "evaluation/score" in row}


def test_a_response_is_right_if_two_positive_numbers_add_up_to_the_answer() -> None:
    responses = ["9+528", "528+9", "537+0", "9+52", "9+528+0", "537", "-1+538", "9 +528", "+537", "9+528\n", "²+535"]
    right = adds_up(responses, ["537"] * len(responses))
    assert right == [1.0, 1.0, *[0.0] * (len(responses) - 2)]


def test_the_contenders_differ_in_the_source_of_their_samples_alone(tmp_path: Path) -> None:
    stages = {stage.section.name: stage.config for stage in plan_chain(chain_of(0, tmp_path), ROOT)}
    on_policy, off_policy = stages["on-policy"].model_dump(), stages["off-policy"].model_dump()
    divergences = [tree["teacher"].pop("divergence") for tree in (on_policy, off_policy)]
    assert [tree.pop("student_share") for tree in divergences] == [1.0, 0.0]
    assert [tree.pop("response_field") for tree in divergences] == [None, "completion"]
    assert divergences[0] == divergences[1]
    for tree in (on_policy, off_policy):
        del tree["run"]["name"]
    assert on_policy == off_policy


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_own_samples_teach_nine_tenths_of_the_teacher_and_more_than_given_ones(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = run_chain(chain_of(seed, tmp_path), ROOT)
    folder = tmp_path / f"distillation-{seed}"
    teacher = json.loads((folder / "teacher-score" / "evaluation.json").read_text())["score"]["mean"]
    curves = {name: curve_of(folder / name) for name in ("on-policy", "off-policy")}
    with capsys.disabled():
        for report in reports:
            print(f"\nseed {seed}, {report.name} ({report.seconds:.0f} s): {report.headline}", end="")
        for name, curve in curves.items():
            print(f"\nseed {seed}, {name}: " + ", ".join(f"{step}: {score:.3f}" for step, score in curve.items()), end="")
    (_, before), *_, (_, after) = curves["on-policy"].items()
    assert before < 0.1 * teacher
    assert after >= 0.9 * teacher
    assert after > [*curves["off-policy"].values()][-1]
