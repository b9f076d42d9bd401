"""The best whole answers of each prompt above the bar become rows for SFT, with every turn that was asked."""

import json

import numpy as np
import pytest

from rayrlhf.config.data import DatasetSection
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.pipelines import EvaluateConfig, EvaluateDataSection, KeepSection
from rayrlhf.data.prompt_datasets import read_prompts
from rayrlhf.errors import UserError
from rayrlhf.pipelines.evaluation.evaluate_model import evaluate_model, read_result
from rayrlhf.pipelines.evaluation.rejection_sampling import KEPT, _row, choose_answers


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (KeepSection(), [1, 6]),
        (KeepSection(per_prompt=2), [1, 2, 6]),
        (KeepSection(per_prompt=9), [1, 2, 6]),
        (KeepSection(at_least=0.5, per_prompt=2), [1, 2, 4, 6]),
        (KeepSection(at_least=3.0), []),
    ],
)
def test_the_best_whole_answers_above_the_bar_are_kept_and_a_text_once(keep, expected):
    #          prompt, text, whole, score
    answers = [
        (0, "a", True, 0.0),
        (0, "b", True, 2.0),
        (0, "c", True, 1.0),
        (0, " b ", True, 2.0),  # the same text again
        (1, "d", True, 0.5),
        (1, "e", False, 2.0),  # cut off
        (2, "f", True, 1.0),
        (2, "  ", True, 2.0),  # nothing
        (2, "g", True, float("nan")),
    ]
    prompts, texts, whole, scores = zip(*answers, strict=True)
    assert choose_answers(prompts, texts, whole, np.array(scores, np.float32), keep) == expected


def test_of_equal_answers_the_earlier_is_kept():
    assert choose_answers([5, 5], ["x", "y"], [True, True], np.ones(2, np.float32), KeepSection()) == [0]


def test_a_row_has_every_turn_the_model_was_asked():
    data = EvaluateDataSection(path="x.jsonl", system_prompt="Be brief.")
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "+1?"}]
    answer = [{"role": "assistant", "content": "3"}]
    assert _row(turns, "3", data) == {"prompt": [{"role": "system", "content": "Be brief."}, *turns], "completion": answer}
    assert _row("1+2=", "3", data)["prompt"][1:] == [{"role": "user", "content": "1+2="}]
    assert _row("1+2=", "3", data.model_copy(update={"chat": False})) == {"prompt": "1+2=", "completion": "3"}


def test_prompts_are_read_as_they_were_asked(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "2+2"}\n{"prompt": [{"role": "user", "content": "hello"}]}\n')
    section = DatasetSection(path=str(path))
    assert read_prompts(section) == ["2+2", [{"role": "user", "content": "hello"}]]
    template = {"template": "Q: {prompt}="}
    assert read_prompts(section.model_copy(update={"limit": 1, **template})) == ["Q: 2+2="]
    with pytest.raises(UserError, match="row 2: prompt: template: no effect on conversations"):
        read_prompts(section.model_copy(update=template))


def config(folder, *overrides):
    (folder / "judge.py").write_text(
        "def digits(responses):\n    return [float(any(c.isdigit() for c in r)) for r in responses]\n"
    )
    settings = [
        "model.path=builtin:tiny?layers=1&hidden=64&context=64",
        "data={path: 'builtin:sums?count=12', split: evaluation, chat: false}",
        f"reward.functions=[{{name: '{folder / 'judge.py'}:digits'}}]",
        "rollout={backend: transformers, max_new_tokens: 4, stop: ['a', 'e', 'i', 'o', '0', '1', '2', '3', '4']}",
        f"run.root={folder}",
        "samples=8",
        "temperature=1.5",
    ]
    return load_config(EvaluateConfig, None, [*settings, *overrides])


def test_an_evaluation_writes_what_it_keeps_as_rows_that_sft_reads(tmp_path):
    from rayrlhf.config.data import SupervisedDatasetSection
    from rayrlhf.data.supervised.row_formats import supervised_shape

    result = evaluate_model(config(tmp_path, "keep={at_least: 0, per_prompt: 2}"))
    rows = [json.loads(line) for line in (result.folder / KEPT).read_text().splitlines()]
    assert 0 < len(rows) == result.kept <= 24
    assert read_result(result.folder).kept == result.kept
    assert any("kept: " in line for line in result.lines())
    assert all(row["prompt"].endswith("=") and row["completion"].strip() for row in rows)
    section = SupervisedDatasetSection(path=str(result.folder / KEPT))
    assert {supervised_shape(row, section, "row").format for row in rows} == {"prompt-completion"}


def test_where_nothing_reaches_the_bar_one_line_says_how_far_the_best_is(tmp_path):
    with pytest.raises(UserError, match=r"keep.at_least 7: no complete answer has this score; the best of all 96"):
        evaluate_model(config(tmp_path, "keep.at_least=7"))
