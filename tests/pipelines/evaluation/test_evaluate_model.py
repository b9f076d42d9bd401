"""An evaluation with a real engine: answers, scores, intervals; done once, and refused with another configuration."""

import numpy as np
import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.pipelines import EvaluateConfig
from rayrlhf.errors import UserError
from rayrlhf.observe.samples import read_samples
from rayrlhf.pipelines.evaluation.evaluate_model import ANSWERS, check_evaluation, evaluate_model, read_result

SETTINGS = [
    "model.path=builtin:tiny?layers=1&hidden=64&context=64",
    "data.path=builtin:sums?count=12",
    "data.split=evaluation",
    "data.chat=false",
    "reward.functions=[{name: gsm8k}, {name: length, weight: 0, arguments: {soft_limit: 2, hard_limit: 4}}]",
    "rollout.backend=transformers",
    "rollout.max_new_tokens=4",
]


def config(folder, *overrides):
    return load_config(EvaluateConfig, None, [*SETTINGS, f"run.root={folder}", *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, evaluate_model(config(folder))


def test_every_prompt_has_an_answer_and_every_part_an_interval(finished):
    _, result = finished
    answers = list(read_samples(result.folder / ANSWERS))
    assert [row["prompt_id"] for row in answers] == list(range(12))
    assert result.prompts == 12
    assert set(result.parts) == {"gsm8k", "length"}
    assert result.score.mean == pytest.approx(sum(row["score"] for row in answers) / 12)
    assert "score over 12 prompts" in result.lines()[0]


def test_a_finished_evaluation_is_read_and_not_repeated(finished, monkeypatch):
    folder, result = finished
    monkeypatch.setattr("rayrlhf.pipelines.evaluation.evaluate_model.build_player", None)
    assert evaluate_model(config(folder)) == result == read_result(result.folder)


def test_another_configuration_under_the_same_name_is_refused(finished):
    folder, _ = finished
    with pytest.raises(UserError, match=r"another configuration \(temperature: 0.0 -> 1.0\)"):
        evaluate_model(config(folder, "temperature=1.0"))


def test_the_check_counts_prompts_and_refuses_lengths_that_do_not_fit(tmp_path):
    assert "prompts: 12 of builtin:sums" in check_evaluation(config(tmp_path))
    with pytest.raises(UserError, match="more than the 64 tokens"):
        check_evaluation(config(tmp_path, "data.max_prompt_tokens=63"))


def test_a_tensor_parallel_size_that_does_not_divide_the_heads_is_refused_before_the_engine_starts(tmp_path):
    pair = config(tmp_path, "rollout.backend=vllm", "rollout.tensor_parallel_size=2")
    for command in (check_evaluation, evaluate_model):
        with pytest.raises(UserError, match=r"^rollout\.tensor_parallel_size 2: .* has 1 attention heads; expected one of 1$"):
            command(pair)


def test_several_answers_a_prompt_give_pass_at_k_and_best_of_k_from_the_answers_that_are_kept(tmp_path):
    judge = tmp_path / "judge.py"
    code = "def first(prompts, responses, **columns):\n    return [float(ord(text[:1] or 'a')) for text in responses]\n"
    judge.write_text(code)
    wanted = ["samples=3", "temperature=1.5", "right_from=100.0", "run.name=often"]
    result = evaluate_model(config(tmp_path, *wanted, f"reward.functions=[{{name: '{judge}:first'}}]"))
    answers = sorted(read_samples(result.folder / ANSWERS), key=lambda row: (row["prompt_id"], row["sample"]))
    assert [(row["prompt_id"], row["sample"]) for row in answers] == [(at, sample) for at in range(12) for sample in range(3)]
    scores = np.array([row["score"] for row in answers]).reshape(12, 3)
    assert 0 < (scores >= 100.0).sum() < scores.size
    assert list(result.pass_at) == list(result.best_of) == [1, 2, 3]
    assert result.best_of[1].mean == pytest.approx(scores.mean())
    assert result.best_of[3].mean == pytest.approx(scores.max(1).mean())
    assert result.pass_at[3].mean == pytest.approx((scores.max(1) >= 100.0).mean())
    assert result.score.mean == pytest.approx(scores.mean())
    assert read_result(result.folder) == result
    assert any(line.startswith("best of 3: ") for line in result.lines())


def test_a_judge_scores_answers_and_chooses_the_best(tmp_path):
    judge = "{model: {path: 'builtin:tiny?layers=1&hidden=64&context=512'}, backend: transformers, min_mass: 0, mode: pairwise}"
    wanted = ["samples=2", "temperature=1.5", "run.name=judged", "best_by=judge_model", "reward.functions=[]"]
    result = evaluate_model(config(tmp_path, *wanted, f"reward.judge={judge}"))
    assert result.score.mean == pytest.approx(0.5)
    assert result.best_of[2].mean > 0.5
    assert result.parts["judge_model_agreement"].mean <= 1
    with pytest.raises(UserError, match=r"reward.judge.mode 'pairwise' compares responses to one prompt: set samples to 2"):
        config(tmp_path, "reward.functions=[]", f"reward.judge={judge}")
    ranked = f"reward.judge={judge.replace('pairwise', 'listwise, against: answer')}"
    with pytest.raises(UserError, match=r"'listwise' shows at most 26 responses at once, found 27: lower samples"):
        config(tmp_path, "samples=26", "temperature=1", "reward.functions=[]", ranked)


def test_answers_without_a_verdict_are_counted_and_written_although_no_reward_applies_to_one(tmp_path, monkeypatch):
    def judged(_, batch, groups):
        return {"judge_model": np.where(np.arange(len(groups)) % 4 == 1, np.nan, 0.5).astype(np.float32)}

    monkeypatch.setattr("rayrlhf.pipelines.evaluation.evaluate_model.JudgeEngine.parts", judged)
    judge = "reward.judge={model: {path: 'builtin:tiny?layers=1&hidden=64&context=512'}, backend: transformers}"
    wanted = ["samples=2", "temperature=1.5", "reward.probe=false", judge]
    result = evaluate_model(config(tmp_path, *wanted, "run.name=partly"))
    assert result.parts["judge_model_missing"].mean == pytest.approx(0.25)
    assert result.parts["judge_model"].mean == pytest.approx(0.5)
    assert read_result(result.folder) == result
    alone = config(tmp_path, *wanted, "run.name=alone", "reward.functions=[]")
    with pytest.raises(UserError, match="no reward applies to sample 1: all of judge_model returned None"):
        evaluate_model(alone)
    scores = np.array([row["score"] for row in read_samples(alone.run.folder / ANSWERS)], dtype=float)
    np.testing.assert_array_equal(np.isnan(scores), [False, True, False, False] * 6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["samples=2"], "greedy responses to a prompt are all equal"),
        (["best_by=reward_model"], "one of gsm8k, length"),
        (["best_by='own:half'", "reward.functions=[{name: 'own:half'}, {name: 'own:half'}]"], "one of half, half_2"),
    ],
)
def test_tries_that_cannot_differ_and_judges_that_do_not_exist_are_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path, *overrides)
