"""What a student learns from: the first weights beside more context, asked once; and that steps bring it nearer."""

import json

import numpy as np
import pytest
import torch

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.model import ModelSection
from rayrlhf.config.tuning import DistillationConfig
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_causal_model, load_tokenizer
from rayrlhf.tuning.distillation_task import MISMATCH, NO_CONTEXT, DistillationTask
from rayrlhf.tuning.teacher import FOLDER
from tests.tuning.runs import SETTINGS, write_rows

ROWS = [
    {"prompt": f"is it {number}?", "context": f"say no. is it {number}?", "completion": ("yes", "no way")[number % 2]}
    for number in range(12)
]

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that is not indifferent to what it reads, as one of fresh weights nearly is."""
    section = ModelSection(path="builtin:tiny?layers=1&hidden=64&context=128")
    network = load_causal_model(section)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.mul_(20.0)
    folder = tmp_path_factory.mktemp("model")
    network.save_pretrained(folder)
    load_tokenizer(section).save_pretrained(folder)
    return folder


def started(folder, model, *overrides, rows=ROWS):
    """Task, engine before its first step, and samples to train on and held out."""
    path = write_rows(folder / "rows.jsonl", rows)
    own = [f"data.train.path={path}", "train.learning_rate=3e-4", f"model.path={model}", *overrides]
    task = DistillationTask(load_config(DistillationConfig, None, [*SETTINGS, *own]))
    table, held_out, report = task.load(load_tokenizer(task.config.model))
    return task, TrainEngine(task.spec(50)), table, held_out, report


def step(task, engine, table):
    batch = task.batch(table.take(range(len(table))))
    return engine.update(batch, UpdatePlan([[range(len(batch))]]), task.objective).metrics["loss/distillation"]


def formula(config, table, kept):
    """Mean KL over response tokens from whole float64 matrices of one transformers model."""
    model = load_causal_model(config.model).double()
    total, count = 0.0, 0

    def logprobs(sample):
        with torch.no_grad():
            logits = model(torch.from_numpy(sample.token_ids.astype(np.int64))[None]).logits[0, :-1]
        return logits[torch.from_numpy(sample.loss_mask[1:])].log_softmax(-1)

    for student, teacher in zip(table.take(range(len(table))), table.teacher.take(range(len(table))), strict=True):
        q, p = logprobs(student), logprobs(teacher)
        if kept is not None:
            top = p.topk(kept).indices
            q, p = (torch.cat([x.gather(1, top), x.scatter(1, top, -torch.inf).logsumexp(1)[:, None]], 1) for x in (q, p))
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    return total / count


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kept", [None, 5])
def test_the_loss_is_the_kl_from_the_same_model_next_to_more_context_and_falls(tmp_path, model, kept, packing):
    chosen = [] if kept is None else [f"train.vocabulary={kept}"]
    task, engine, bare, held_out, _ = started(tmp_path, model, *chosen, f"train.packing={str(packing).lower()}")
    table = task.prepare(engine, bare, tmp_path)
    first = step(task, engine, table)
    assert first == pytest.approx(formula(task.config, table, kept), rel=1e-3)
    last = [step(task, engine, table) for _ in range(15)][-1]
    assert last < first / 2
    # Asked again, the moved weights change nothing of what was said.
    again = task.prepare(engine, bare, tmp_path)
    assert all(np.array_equal(again.signal[name], rows) for name, rows in table.signal.items())
    assert len(list((tmp_path / FOLDER).iterdir())) == 1
    assert len(held_out) > 0


@pytest.mark.parametrize("overrides", [(), ("train.vocabulary=7",), ("model.lora={rank: 4}",)], ids=["full", "top", "adapters"])
def test_held_out_responses_are_measured_by_the_same_formula(tmp_path, model, overrides):
    task, engine, bare, held_out, _ = started(tmp_path, model, *overrides)
    table, held_out = task.prepare(engine, bare, tmp_path), task.prepare(engine, held_out, tmp_path)
    kept = task.config.train.vocabulary if task.config.train.vocabulary != "full" else None
    before, _ = task.evaluate(engine, held_out)
    assert before["evaluation/loss"] == pytest.approx(formula(task.config, held_out, kept), rel=1e-3)
    learnt, _ = task.evaluate(engine, table)
    for _ in range(15):
        step(task, engine, table)
    assert task.evaluate(engine, table)[0]["evaluation/loss"] < learnt["evaluation/loss"]


def test_rows_whose_teacher_read_another_response_or_nothing_are_left_out_and_counted(tmp_path, model):
    long = {"prompt": "is it?", "context": "say no. " * 60, "completion": "yes"}
    task, _, table, held_out, report = started(
        tmp_path, model, "data.overlong=drop", "data.evaluation_share=null", rows=[*ROWS, long]
    )
    assert held_out is None
    assert len(table) == 12
    assert report.dropped == {NO_CONTEXT: 1}
    assert table.longest == max(table.teacher.lengths) > max(table.lengths)
    assert MISMATCH not in report.dropped
    rows = [json.loads(json.dumps(row | {"context": "say no. " * 60})) for row in ROWS]
    with pytest.raises(UserError, match="all 12 rows were dropped"):
        started(tmp_path, model, "data.overlong=drop", rows=rows)
    assert task.config.data.context_field == "context"


def test_a_resumed_student_has_the_teacher_it_began_with(tmp_path, model):
    task, engine, bare, _, _ = started(tmp_path, model)
    table = task.prepare(engine, bare, tmp_path)
    for _ in range(2):
        step(task, engine, table)
    engine.save_state(tmp_path / "state")
    expected = step(task, engine, table)
    task, other, bare, _, _ = started(tmp_path, model)
    table = task.prepare(other, bare, tmp_path)
    other.load_state(tmp_path / "state")
    assert step(task, other, table) == expected


def test_the_teacher_is_read_with_the_output_layer_it_began_with_while_the_students_moves(tmp_path, model):
    task, engine, bare, _, _ = started(tmp_path, model, "train.learning_rate=0.1")
    table = task.prepare(engine, bare, tmp_path)
    for _ in range(3):
        step(task, engine, table)
    start = load_causal_model(task.config.model).get_output_embeddings().weight
    assert torch.equal(engine.teacher_layer[0], start)
    assert (engine.output_layer()[0] - start).abs().max() > 0.1
    measured = task.evaluate(engine, table)[0]["evaluation/loss"]
    assert step(task, engine, table) == pytest.approx(measured, rel=1e-3)
