"""The quickstart: its configuration under each algorithm, what it prints, and that PPO alone makes its gain."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rayrlhf.actors.placement import ClusterResources, make_plan
from rayrlhf.actors.role_specs import RoleSpecs
from rayrlhf.config.loading.presets import RECIPES
from rayrlhf.errors import UserError
from rayrlhf.observe.closing import EVALUATIONS
from rayrlhf.observe.samples import Sample, SampleSink
from rayrlhf.ppo.quickstart import ALGORITHMS, EXACT, curve_table, quickstart_config, run_quickstart, summary
from rayrlhf.ppo.run_recorder import read_evaluation
from rayrlhf.ppo.train_ppo import PPOResult


def test_the_quickstart_is_ppo_with_a_critic_and_without_a_warm_up():
    config = quickstart_config([])
    assert config.sft_warmup is None
    assert (config.critic.kind, config.algorithm.advantage.estimator) == ("shared", "gae")
    assert config.needs_reference
    assert RoleSpecs(config, make_plan(config, ClusterResources((2.0,), (0.0,)))).train("policy").head_learning_rate == 1e-4
    assert 0 < config.evaluation.every < config.run.steps


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "ppo"])
def test_another_algorithm_has_its_recipe_on_the_same_task(algorithm: str):
    ppo, config = quickstart_config([]), quickstart_config(["run.steps=3"], algorithm)
    recipe = RECIPES[algorithm]["algorithm"]
    assert config.algorithm.advantage.estimator == recipe["advantage"]["estimator"]
    assert config.algorithm.policy_loss.name == recipe["policy_loss"]["name"]
    assert config.algorithm.kl.placement == recipe["kl"].get("placement", "reward")
    assert config.algorithm.kl.coefficient == min(ppo.algorithm.kl.coefficient, recipe["kl"]["coefficient"])
    assert (config.critic.kind, config.run.steps, config.run.name) == ("none", 3, f"quickstart-{algorithm.replace('+', 'p')}")
    assert (config.data, config.reward, config.samples_per_step) == (ppo.data, ppo.reward, ppo.samples_per_step)
    assert (config.train.learning_rate, config.updates_per_step) == (ppo.train.learning_rate, ppo.updates_per_step)


def test_an_override_wins_over_the_algorithm():
    config = quickstart_config(["run.name=mine", "algorithm.kl.coefficient=0.5"], "grpo")
    assert (config.run.name, config.algorithm.kl.coefficient) == ("mine", 0.5)


def test_an_unknown_algorithm_is_one_line():
    with pytest.raises(UserError, match=r"--algorithm grop: expected ppo, grpo, .*; did you mean 'grpo'\?"):
        quickstart_config([], "grop")
    with pytest.raises(UserError, match=r"--algorithm vapo: its critic is pretrained for more steps .*; expected ppo, grpo, "):
        quickstart_config([], "vapo")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with two steps, and evaluations before and after them."""
    steps = [{"step": 1, "objective/scores": 0.25, "objective/scores_error": 0.05, EXACT: 0.125, "objective/kl": 0.0}]
    steps += [{"step": 2, "objective/scores": 0.5, EXACT: 0.25, "objective/kl": 7.5}]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [{"step": 0, "evaluation/score": 0.2}, *steps])
    )
    sink = SampleSink(tmp_path / EVALUATIONS)
    for step, scores in ((0, (0.0, 0.4)), (2, (0.6, 1.0))):
        sink.write(
            step,
            [
                Sample(i, 0, "p", f"r{i}", score, 3, "stop", 1, parts={"worked_answer_exact": float(score == 1)})
                for i, score in enumerate(scores)
            ],
        )
    return tmp_path


def test_the_curve_has_each_step_with_its_interval_and_the_evaluations(run: Path):
    console = Console(width=120, file=io.StringIO())
    with console.capture() as capture:
        console.print(curve_table(run))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines() if "│" in line]
    assert lines == [
        ["0", "", "", "", "0.200 [0.000, 0.400]", "0.0%"],
        ["1", "0.250 ± 0.098", "12%", "0.0", "", ""],
        ["2", "0.500", "25%", "7.5", "0.800 [0.600, 1.000]", "50.0%"],
    ]


def test_the_summary_says_what_changed(run: Path):
    before, after = (read_evaluation(run, step) for step in (0, 2))
    text = "\n".join(summary(PPOResult(run, 2, 90.0, 3.0), before, after))
    assert "reward on 2 held-out problems: 0.200 [0.000, 0.400] -> 0.800 [0.600, 1.000], change 0.600" in text
    assert "right and ended there: 0.0% -> 50.0%; distinct answers: 100%; largest KL to the start model: 7.5" in text
    assert "2 PPO steps, 1.5 minutes, peak memory 3.0 GiB" in text


def test_what_was_not_measured_is_not_shown_as_a_number(run: Path):
    before, after = (read_evaluation(run, step) for step in (0, 2))
    plain = [[{key: value for key, value in row.items() if key != EXACT} for row in rows] for rows in (before, after)]
    text = "\n".join(summary(PPOResult(run, 2, 90.0, 3.0), *plain, kl=False))
    assert "right and ended there: - -> -; distinct answers: 100%; largest KL to the start model: not measured" in text
    console = Console(width=120, file=io.StringIO())
    with console.capture() as capture:
        console.print(curve_table(run, kl=False))
    assert "7.5" not in capture.get()


def test_the_quickstart_is_refused_without_its_evaluations():
    with pytest.raises(UserError, match=r"evaluation\.enabled false: the quickstart compares held-out answers"):
        run_quickstart(["evaluation.enabled=false"])


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_alone_makes_the_gain(tmp_path: Path, seed: int):
    settings = [f"run.root={tmp_path}", f"run.seed={seed}"]
    run_quickstart(settings)
    config = quickstart_config(settings)
    before, after = (read_evaluation(config.run.folder, step) for step in (0, config.run.steps))

    def mean(rows: list[dict[str, float]], name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    assert mean(after, "score") > mean(before, "score") + 0.3
    assert mean(before, EXACT) < 0.1
    assert mean(after, EXACT) > 0.3
    assert len({row["response"] for row in after}) > 0.6 * len(after)
