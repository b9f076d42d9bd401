"""In-context SFT data: what a sample shows, what it never shows, and that SFT reads what was written."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.config.data import SupervisedDataSection, SupervisedDatasetSection
from rayrlhf.config.icl import ICLBuildConfig
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.model import ModelSection
from rayrlhf.data.supervised.datasets import load_supervised
from rayrlhf.demonstrations.example import Example
from rayrlhf.demonstrations.ranking import Bm25Ranker
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_tokenizer
from rayrlhf.pipelines.icl.build_dataset import build_dataset, check_build, may_change
from rayrlhf.pipelines.icl.example_pool import StoredPool, write_pool, write_vectors
from rayrlhf.pipelines.icl.sample_builder import OVER_BUDGET, BuildPlan, SampleBuilder, draw_count

TINY = "builtin:tiny?layers=1&hidden=64"
WORDS = ["red fox", "blue hen", "red hen", "green ant", "blue fox", "green cow", "red cow", "blue ant"]


def examples(count: int, tasks: int = 1) -> list[Example]:
    made = []
    for number in range(count):
        task = f"t{number % tasks}" if tasks > 1 else ""
        made.append(Example(f"d:{number}", f"{WORDS[number % 8]} {number}", f"{task}A{number}", task))
    return made


def config(*overrides: str) -> ICLBuildConfig:
    own = [f"model.path={TINY}", "data.path=none.jsonl", "demonstrations.most=3"]
    return load_config(ICLBuildConfig, None, [*own, *overrides])


def built(pool: list[Example], folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Run one process's work without Ray."""
    import pyarrow as pa

    settings = config("data.task_field=task", *overrides)
    write_pool([pool[:5], pool[5:]], folder)
    load_tokenizer(settings.model).save_pretrained(folder / "tokenizer")
    if settings.demonstrations.selection == "bm25":
        Bm25Ranker.build([example.prompt for example in pool], folder / "bm25")
    table = pa.table({"row": range(len(pool)), "source": range(1, len(pool) + 1)})
    rows: list[dict[str, Any]] = SampleBuilder(BuildPlan(settings, folder))(table).to_pylist()
    return rows


def test_a_stored_pool_gives_back_what_was_written_and_the_positions_of_each_task(tmp_path: Path) -> None:
    pool = examples(20, tasks=3)
    write_pool([pool[:7], pool[7:]], tmp_path)
    stored = StoredPool(tmp_path)
    assert list(stored) == pool
    assert {task: positions.tolist() for task, positions in stored.tasks.items()} == {
        f"t{task}": [number for number in range(20) if number % 3 == task] for task in range(3)
    }


def test_the_number_of_demonstrations_is_drawn_evenly_and_zero_shot_is_kept() -> None:
    counts = Counter(draw_count(f"d:{number}", 0, 3, seed=1) for number in range(4000))
    assert set(counts) == {0, 1, 2, 3}
    assert all(abs(count - 1000) < 150 for count in counts.values())
    assert [draw_count(f"d:{number}", 2, 2, seed=0) for number in range(5)] == [2] * 5
    assert [draw_count(f"d:{number}", 0, 9, 0) for number in range(50)] != [
        draw_count(f"d:{number}", 0, 9, 1) for number in range(50)
    ]


@pytest.mark.parametrize("selection", ["random", "bm25"])
def test_demonstrations_are_others_of_the_same_task_with_their_true_answers(tmp_path: Path, selection: str) -> None:
    pool = examples(24, tasks=2)
    answers = {example.prompt: example.answer for example in pool}
    rows = built(pool, tmp_path, f"demonstrations.selection={selection}", "demonstrations.least=3")
    for target, row in zip(pool, rows, strict=True):
        *context, question = row["prompt"]
        assert question == {"role": "user", "content": target.prompt}
        assert row["completion"] == [{"role": "assistant", "content": target.answer}]
        shown = list(zip(context[::2], context[1::2], strict=True))
        assert len(shown) == row["shown"] == 3
        for asked, answered in shown:
            assert asked["content"] != target.prompt
            assert answered["content"] == answers[asked["content"]]
            assert answered["content"].startswith(target.task)


def test_the_nearest_stands_next_to_the_question(tmp_path: Path) -> None:
    pool = [Example(f"d:{n}", text, f"A{n}") for n, text in enumerate(["a b c d", "a b c x", "a b y z", "a u v w", "q r s t"])]
    bm25 = ("demonstrations.selection=bm25", "demonstrations.least=3")
    [first, *_] = built(pool, tmp_path / "far", *bm25)
    assert [turn["content"] for turn in first["prompt"][::2]] == ["a u v w", "a b y z", "a b c x", "a b c d"]
    [first, *_] = built(pool, tmp_path / "near", *bm25, "demonstrations.order=near_to_far")
    assert [turn["content"] for turn in first["prompt"][::2]] == ["a b c x", "a b y z", "a u v w", "a b c d"]


def test_planted_duplicates_are_never_shown_and_counted(tmp_path: Path) -> None:
    long = "the answer which is long enough to be compared with others in full"
    pool = [
        Example("d:0", "what is it", long),
        Example("d:1", "What  is IT", "another"),
        Example("d:2", "what is it about", f"{long} !"),
        Example("d:3", "what else", "short"),
        Example("d:4", "which one", "short"),
    ]
    rows = built(pool, tmp_path, "demonstrations.selection=bm25", "demonstrations.least=3")
    assert [turn["content"] for turn in rows[0]["prompt"]] == ["which one", "short", "what else", "short", "what is it"]
    assert json.loads(rows[0]["leaks"]) == {"itself": 1, "same_text": 1, "near_answer": 1}
    assert rows[0]["short"] == 1


def test_what_does_not_fit_goes_from_the_far_end_and_is_counted(tmp_path: Path) -> None:
    pool = [Example(f"d:{n}", text, "A") for n, text in enumerate(["a b c d", "a b c x", "a b y z", "a u v w", "b" * 90])]
    limit = "sample.max_tokens=100"
    rows = built(pool, tmp_path, "demonstrations.selection=bm25", "demonstrations.least=3", limit)
    assert [turn["content"] for turn in rows[0]["prompt"][::2]] == ["a b y z", "a b c x", "a b c d"]
    assert (rows[0]["shown"], rows[0]["dropped"]) == (2, 1)
    assert rows[0]["tokens"] <= 100
    assert (rows[4]["problem"], rows[4]["prompt"]) == (OVER_BUDGET, None)


@pytest.mark.parametrize("layout", ["turns", "system", "text"])
@pytest.mark.parametrize("loss_on", ["target", "every"])
def test_sft_reads_the_samples_counts_the_same_tokens_and_learns_the_chosen_answers(
    tmp_path: Path, layout: str, loss_on: str
) -> None:
    if loss_on == "every" and layout != "turns":
        with pytest.raises(UserError, match="loss_on every needs layout turns"):
            config(f"sample.layout={layout}", "sample.loss_on=every")
        return
    pool = examples(12)
    rows = built(pool, tmp_path / "pool", f"sample.layout={layout}", f"sample.loss_on={loss_on}", "demonstrations.least=2")
    columns = ("messages",) if loss_on == "every" else ("prompt", "completion")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({name: row[name] for name in columns}) + "\n" for row in rows))
    tokenizer = load_tokenizer(ModelSection(path=TINY))
    data = SupervisedDataSection(train=SupervisedDatasetSection(path=str(path)), chat=layout != "text")
    samples = load_supervised(data.train, data, tokenizer).samples
    for target, row, sample in zip(pool, rows, samples, strict=True):
        assert len(sample.token_ids) == row["tokens"]
        learnt = tokenizer.decode(sample.token_ids[sample.loss_mask]).split("<|im_end|>")
        answers = [text.strip() for text in learnt if text.strip()]
        assert len(answers) == (row["shown"] + 1 if loss_on == "every" else 1)
        assert answers[-1] == target.answer


def test_an_encoder_that_does_not_say_how_it_pools_is_found_before_the_data_is_read() -> None:
    nearest = ("demonstrations.selection=nearest", f"demonstrations.encoder={TINY}")
    with pytest.raises(UserError, match="states its pooling; set pooling to mean or cls"):
        check_build(config(*nearest))
    assert "nearest" in check_build(config(*nearest, "demonstrations.pooling=mean"))
    with pytest.raises(UserError, match="belong together"):
        config(f"demonstrations.encoder={TINY}")


def test_too_few_examples_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": "a", "kind": "x"}) + "\n" for n in range(3)))
    few = config(f"data.path={path}", f"run.root={tmp_path}")
    with pytest.raises(UserError, match=r"the dataset has 3 examples, too few for 3 demonstrations .* expected at least 4"):
        build_dataset(few)
    missing = config(f"data.path={path}", f"run.root={tmp_path}", "data.task_field=task")
    with pytest.raises(UserError, match=r"few.jsonl:1: task: missing, expected the row's task; found kind"):
        build_dataset(missing)
    assert load_config(ICLBuildConfig, tmp_path / "in-context" / "config.yaml").data.task_field == "task"
    with pytest.raises(UserError, match=r"data\.limit"):
        build_dataset(config(f"data.path={path}", f"run.root={tmp_path}", "data.limit=2"))


def test_what_was_made_already_fixes_the_settings_it_was_made_with() -> None:
    assert may_change("demonstrations.most", indexed=False)
    assert may_change("data.task_field", indexed=False)
    assert may_change("pipeline.builders", indexed=True)
    for key in ("demonstrations.most", "sample.layout", "data.task_field", "model.path", "pipeline.rows_per_part"):
        assert not may_change(key, indexed=True)
    for key in ("data.path", "data.limit", "pipeline.rows_per_part"):
        assert not may_change(key, indexed=False)


@pytest.mark.slow
def test_the_command_makes_the_same_dataset_again_and_says_what_it_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"{WORDS[n % 8]} {n}", "completion": f"A{n}"}) for n in range(40)]
    lines[7] = json.dumps({"prompt": " ", "completion": "empty"})
    lines[9] = json.dumps({"prompt": "long " * 200, "completion": "over"})
    path.write_text("\n".join(lines))
    file = tmp_path / "build.yaml"
    file.write_text(
        f"model: {{path: '{TINY}'}}\nrun: {{root: {tmp_path / 'runs'}}}\n"
        f"data: {{path: {path}, max_rejected_share: 0.1}}\n"
        "demonstrations: {most: 4, selection: nearest, encoder: 'builtin:tiny?layers=1&hidden=64', pooling: mean}\n"
        "sample: {max_tokens: 600}\npipeline: {rows_per_part: 16, builders: 2}\n"
    )
    results = []
    for name in ("first", "second"):
        result = CliRunner().invoke(app, ["icl", "build", str(file), f"run.name={name}"], catch_exceptions=False)
        assert result.exit_code == 0
        assert "samples: 38 of 40 rows" in result.output
        assert "left out: 1 rows: prompt is empty" in result.output
        assert f"left out: 1 rows: {OVER_BUDGET}" in result.output
        results.append(pq.read_table(tmp_path / "runs" / name / "dataset.parquet"))
    assert results[0].equals(results[1])
    assert results[0].column("source").to_pylist() == [n + 1 for n in range(40) if n not in (7, 9)]
    assert set(results[0].column("shown").to_pylist()) == {0, 1, 2, 3, 4}
    data = SupervisedDataSection(train=SupervisedDatasetSection(path=str(tmp_path / "runs/first/dataset.parquet")))
    assert len(load_supervised(data.train, data, load_tokenizer(ModelSection(path=TINY))).samples) == 38


def test_processes_map_the_examples_and_the_vectors_and_copy_neither(tmp_path: Path) -> None:
    import pyarrow as pa

    pool = [Example(f"d:{number}", f"word{number} " * 50, "A") for number in range(5000)]
    write_pool([pool], tmp_path)
    load_tokenizer(ModelSection(path=TINY)).save_pretrained(tmp_path / "tokenizer")
    vectors = np.random.default_rng(0).normal(size=(5000, 8)).astype(np.float32)
    write_vectors(iter([vectors[:3000], vectors[3000:]]), 5000, tmp_path / "vectors.npy")
    before = pa.total_allocated_bytes()
    nearest = ("demonstrations.selection=nearest", f"demonstrations.encoder={TINY}", "demonstrations.pooling=mean")
    builder = SampleBuilder(BuildPlan(config(*nearest), tmp_path))
    assert pa.total_allocated_bytes() - before < 10_000 < (tmp_path / "examples.arrow").stat().st_size
    assert isinstance(builder._vectors, np.memmap)
    np.testing.assert_array_equal(builder._vectors, vectors)
    assert builder._pool[4321] == pool[4321]


def test_parts_made_again_are_the_same_and_those_of_another_seed_are_not(tmp_path: Path) -> None:
    pool = examples(30)
    rows = built(pool, tmp_path / "one")
    assert rows == built(pool, tmp_path / "two")
    assert rows != built(pool, tmp_path / "three", "run.seed=1")
