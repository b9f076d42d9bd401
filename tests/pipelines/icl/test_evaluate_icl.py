"""A whole k-curve on Ray with tiny models, and what is refused before anything is asked."""

import json

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.config.icl import ICLEvaluateConfig
from rayrlhf.config.loading.load import load_config
from rayrlhf.errors import UserError
from rayrlhf.pipelines.icl.answering import AnswerScorer
from rayrlhf.pipelines.icl.evaluate_icl import check_evaluation, evaluate_curve

TINY = "builtin:tiny?layers=1&hidden=64&context=512"


def config(folder, *overrides, rows=12):
    lines = [{"prompt": f"item {number}", "completion": "ab"[number % 2], "task": "t"} for number in range(rows)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    base = [
        f"run.root={folder}",
        f"models={{first: {{path: '{TINY}', dtype: float32}}, second: {{path: '{TINY}', dtype: float32}}}}",
        f"data={{path: {path}, task_field: task, limit: 6}}",
        f"pool={{path: {path}, task_field: task}}",
        "generate={backend: transformers, max_new_tokens: 3}",
        "demonstrations={counts: [0, 2], ablations: [none, format], seeds: 2}",
        "pipeline.rows_per_part=8",
    ]
    return load_config(ICLEvaluateConfig, None, [*base, *overrides])


@pytest.mark.slow
def test_a_curve_has_all_its_points_answers_and_a_page_and_a_rerun_asks_nothing(tmp_path):
    wanted = config(tmp_path)
    result = evaluate_curve(wanted)
    assert [(point.model, point.ablation, point.k) for point in result.points] == [
        (model, *place) for model in ("first", "second") for place in (("format", 2), ("none", 0), ("none", 2))
    ]
    assert all(point.questions == 6 for point in result.points)
    answers = pq.read_table(result.folder / "first-answers.parquet").to_pylist()
    assert len(answers) == 2 * 6 * 3
    assert all(answer["finish"] in ("stop", "length") for answer in answers)
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert "copying an answer" in page
    assert "Ablations of the demonstrations" in page
    assert len(result.lines()) == 5
    made = {path: path.stat().st_mtime_ns for path in result.folder.glob("answers/*/part-*.parquet")}
    assert len(made) == 10
    assert evaluate_curve(wanted).points == result.points
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_fewer_examples_than_demonstrations_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl: 12 examples cannot give 20 demonstrations"):
        evaluate_curve(config(tmp_path, "demonstrations={counts: [20]}"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("demonstrations.counts=[1, 1]", "expected different numbers"),
        ("demonstrations.ablations=[flip, flip]", "expected each once"),
        ("demonstrations.selection=nearest", "encoder and selection nearest"),
        ("metric=reward", "reward and metric reward belong together"),
        ("context.question=x", "question has no {prompt}"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line(tmp_path, override, words):
    with pytest.raises(UserError, match=words):
        config(tmp_path, override)


def test_an_answer_is_scored_by_equality_bleu_or_a_function(tmp_path):
    rows = [
        {"text": " A ", "answer": "a", "question": "q", "finish": "stop", "tokens": 1, "columns": "{}"},
        {"text": "b", "answer": "a", "question": "q", "finish": "stop", "tokens": 1, "columns": "{}"},
    ]
    assert AnswerScorer(config(tmp_path)).scores(rows) == [1.0, 0.0]
    assert AnswerScorer(config(tmp_path, "metric=bleu")).scores(rows) == [0.0, 0.0]
    reward = "reward={functions: [{name: format, arguments: {pattern: b}}]}"
    assert AnswerScorer(config(tmp_path, "metric=reward", reward)).scores(rows) == [0.0, 1.0]


def test_a_tensor_parallel_size_that_does_not_divide_the_heads_of_a_model_is_refused(tmp_path):
    generate = "generate={backend: vllm, tensor_parallel_size: 2, max_new_tokens: 3}"
    with pytest.raises(UserError, match=r"^generate\.tensor_parallel_size 2: .* has 1 attention heads; expected one of 1$"):
        check_evaluation(config(tmp_path, generate))


def test_the_plan_is_told_without_starting_anything(tmp_path):
    told = check_evaluation(config(tmp_path))
    assert "demonstrations: 0, 2; random, far to near; none, format; 2 draws" in told
    result = CliRunner().invoke(app, ["icl", "evaluate", str(tmp_path / "missing.yaml"), "--dry-run"])
    assert isinstance(result.exception, UserError)
