"""A whole distillation on Ray with a tiny model, what the teacher reads, and what is refused in one line."""

import json

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.config.icl import ICLDistillConfig
from rayrlhf.config.loading.load import load_config
from rayrlhf.errors import UserError
from rayrlhf.pipelines.chain.stages import STAGES
from rayrlhf.pipelines.icl.distill import check_distillation, distill_context, student_config
from tests.tuning.runs import write_rows

TINY = "builtin:tiny?layers=1&hidden=64&context=256"


def config(folder, *overrides, rows=12):
    lines = [{"prompt": f"item {number}", "completion": "ab"[number % 2], "task": f"t{number % 2}"} for number in range(rows)]
    path = write_rows(folder / "rows.jsonl", lines)
    base = [
        f"run.root={folder}",
        f"model={{path: '{TINY}', dtype: float32}}",
        f"data={{path: {path}, task_field: task, system_prompt: Be short.}}",
        "teacher={demonstrations: 3, instruction: Say a letter.}",
        "generate={backend: transformers, max_new_tokens: 4}",
        "train={steps: 3, batch_size: 4, learning_rate: 0.001}",
        "evaluation_share=0.2",
        "evaluation.generations=0",
        "workers.cpus=1",
    ]
    return load_config(ICLDistillConfig, None, [*base, *overrides])


@pytest.mark.nightly
def test_a_student_learns_sampled_answers_to_bare_prompts_and_a_rerun_does_nothing(tmp_path):
    wanted = config(tmp_path, "teacher.responses=sampled")
    result = distill_context(wanted)
    assert (result.export / "model.safetensors").is_file()
    assert result.export == tmp_path / "distilled" / STAGES["icl-distill"].export
    assert result.metrics["evaluation/loss"] >= 0
    rows = pq.read_table(result.folder / "dataset.parquet").to_pylist()
    assert len(rows) == 12
    for number, row in enumerate(rows):
        assert row["prompt"] == [{"role": "system", "content": "Be short."}, {"role": "user", "content": f"item {number}"}]
        system, *turns, last = row["context"]
        assert system == {"role": "system", "content": "Be short.\n\nSay a letter."}
        assert last == row["prompt"][-1]
        shown = [int(turn["content"].removeprefix("item ")) for turn in turns[::2]]
        assert len(set(shown)) == 3
        assert number not in shown
        assert {one % 2 for one in shown} == {number % 2}
        assert [turn["content"] for turn in turns[1::2]] == ["ab"[number % 2]] * 3
    assert result.report["read"] == 12
    assert result.report["shown"] == {"3": 12}
    made = {path: path.stat().st_mtime_ns for path in result.folder.rglob("part-*.parquet")}
    assert distill_context(wanted).metrics == result.metrics
    assert {path: path.stat().st_mtime_ns for path in made} == made
    with pytest.raises(UserError, match=r"teacher.demonstrations"):
        distill_context(config(tmp_path, "teacher.responses=sampled", "teacher.demonstrations=2"))


def test_plain_text_shows_the_instruction_to_the_teacher_alone(tmp_path):
    from rayrlhf.pipelines.icl.distill import _questions, _samples

    wanted = config(tmp_path, "context={layout: text, question: 'Q: {prompt} A: '}", "teacher.demonstrations=1")
    (first, *_) = _samples(wanted, list(_questions(wanted, tmp_path / "run").rows()))
    assert first["prompt"] == "Be short.\n\nQ: item 0 A: "
    assert first["context"].startswith("Be short.\n\nSay a letter.\n\nQ: item ")
    assert first["context"].endswith("A: a\n\nQ: item 0 A: ")
    assert first["completion"] == "a"
    assert not student_config(wanted).data.chat


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.demonstrations=0", "teacher.instruction=null"], "the teacher has the same context as the student"),
        (["teacher.selection=nearest"], "encoder and selection nearest"),
        (["train.vocabulary=0"], r"train\.vocabulary"),
        (["context.question=x"], r"question has no \{prompt\}"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line(tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        config(tmp_path, *overrides)


def test_what_cannot_be_shown_is_refused_or_dropped_from_the_far_end_and_counted(tmp_path):
    from rayrlhf.pipelines.icl.distill import _questions, _report

    with pytest.raises(UserError, match=r"rows.jsonl: 11 examples cannot give 20 demonstrations"):
        distill_context(config(tmp_path, "run.name=few", "teacher.demonstrations=20"))
    with pytest.raises(UserError, match=r"generate.max_new_tokens 250: the model's context has 256 tokens"):
        check_distillation(config(tmp_path, "generate.max_new_tokens=250"))
    with pytest.raises(UserError, match="pooling"):
        check_distillation(config(tmp_path, f"teacher={{selection: nearest, encoder: '{TINY}'}}"))
    lines = [{"prompt": f"item {number}", "completion": "a" * 60} for number in range(6)]
    lines += [{"prompt": "item 0", "completion": "b"}, {"prompt": "", "completion": "b"}]
    long = write_rows(tmp_path / "long.jsonl", lines)
    data = f"data={{path: {long}, max_rejected_share: 0.5}}"
    # By words a twin is the nearest; at random the folder's name decides if it is drawn at all.
    wanted = config(tmp_path, data, "teacher.demonstrations=4", "teacher.selection=bm25", "teacher.max_context_tokens=150")
    questions = _questions(wanted, tmp_path / "run")
    report = _report(wanted, questions, questions)
    assert report["dropped"] > 0
    assert sum(int(shown) * count for shown, count in report["shown"].items()) + report["dropped"] == 7 * 4
    assert sum(report["rejected"].values()) == 1
    assert report["leaks"]["same_text"] == 2
    for row in questions.rows():
        asked = [turn["content"] for turn in json.loads(row["messages"]) if turn["role"] == "user"]
        assert asked.count(row["question"]) == 1


def test_prompts_need_answers_only_where_someone_reads_them(tmp_path):
    from rayrlhf.pipelines.icl.distill import _questions

    path = write_rows(tmp_path / "bare.jsonl", [{"prompt": f"ask {number}"} for number in range(4)])
    own = [f"data={{path: {path}}}", "teacher={demonstrations: 0, instruction: Say a letter., responses: sampled}"]
    rows = list(_questions(config(tmp_path, *own), tmp_path / "one").rows())
    assert [row["question"] for row in rows] == [f"ask {number}" for number in range(4)]
    for other in ("teacher.responses=given", "teacher.demonstrations=1"):
        with pytest.raises(UserError, match="no field completion"):
            _questions(config(tmp_path, *own, other), tmp_path / other)


def test_the_plan_is_told_without_starting_anything(tmp_path):
    told = check_distillation(config(tmp_path))
    assert STAGES["icl-distill"].outputs(tmp_path, config(tmp_path))["export"] == str(tmp_path / "student" / "export")
    assert "3 demonstrations (random) and an instruction" in told
    result = CliRunner().invoke(app, ["icl", "distill", str(tmp_path / "missing.yaml"), "--dry-run"])
    assert isinstance(result.exception, UserError)
