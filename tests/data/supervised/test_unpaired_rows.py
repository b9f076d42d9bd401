"""Rows of KTO as people have them: prompt, completion and label; and pairs, each of which gives two answers."""

import json

import numpy as np
import pytest

from rayrlhf.config.data import PreferenceDataSection
from rayrlhf.data.supervised.datasets import load_preference_data
from rayrlhf.data.supervised.supervised_samples import count_tokens
from rayrlhf.errors import UserError
from rayrlhf.models.tiny import byte_tokenizer
from rayrlhf.tuning.sample_table import PairTable
from rayrlhf.tuning.unpaired_task import with_partners

ROWS = [
    {"prompt": "1+1=", "completion": "2", "label": True},
    {"prompt": "2+2=", "completion": "5", "label": False},
    {"prompt": "3+3=", "completion": "66", "label": "true"},
]


def load(folder, rows, *, labels=True, **settings):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceDataSection(**({"train": {"path": str(path)}, "chat": False, "evaluation_share": None} | settings))
    data = data.model_copy(update={"evaluation": data.train})
    return load_preference_data(data, byte_tokenizer(), labels=labels)[0]


def test_answers_keep_their_labels_and_get_the_next_answer_as_partner(tmp_path):
    tokenizer = byte_tokenizer()
    dataset = load(tmp_path, ROWS)
    assert "read as answers with labels (KTO): completion, label, prompt" in "\n".join(dataset.report.lines())
    assert (
        dataset.report.tokens == count_tokens(dataset.samples)[0] == sum(len(one.chosen.token_ids) for one in dataset.samples)
    )
    table = PairTable.of(with_partners(dataset.samples, 64, "rows"))
    taken = table.take(range(3))
    assert [one.label for one in taken] == [True, False, True]

    def learnt(sample):
        return tokenizer.decode(sample.token_ids[sample.loss_mask], skip_special_tokens=True)

    assert [learnt(one.chosen) for one in taken] == ["2", "5", "66"]
    assert [learnt(one.rejected) for one in taken] == ["5", "66", "2"]
    for one in taken:
        prompts = [side.token_ids[: int(side.loss_mask.argmax())] for side in (one.chosen, one.rejected)]
        assert np.array_equal(*prompts)


def test_a_pair_gives_a_desirable_and_an_undesirable_answer(tmp_path):
    rows = [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": str(n)} for n in range(1, 4)]
    answers = with_partners(load(tmp_path, rows).samples, 64, "rows")
    assert [one.label for one in answers] == [True] * 3 + [False] * 3
    assert [one.row for one in answers] == [1, 2, 3] * 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0] | {"label": 0.5}], r"rows\.jsonl.*: label: expected true or false, found 0\.5"),
        ([ROWS[0], {"prompt": "x", "completion": "y"}], "label: missing or null, expected as in the first row"),
        ([{"prompt": "x", "text": "y"}], "expected the columns prompt and completion and label, or chosen and rejected"),
        ([ROWS[0] | {"completion": " "}], "completion: empty, expected text to learn from"),
    ],
)
def test_rows_without_a_usable_label_are_one_line(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, rows)


def test_one_answer_alone_has_no_partner(tmp_path):
    with pytest.raises(UserError, match="expected two answers or more, found one"):
        with_partners(load(tmp_path, ROWS[:1]).samples, 64, "rows.jsonl")


def test_other_losses_read_no_labels(tmp_path):
    with pytest.raises(UserError, match="completions without a rejected one"):
        load(tmp_path, ROWS, labels=False)
