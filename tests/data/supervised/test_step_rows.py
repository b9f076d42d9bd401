"""Rows of labeled steps: the tokens of TRL 1.8's `PRMTrainer`, one line for each mistake, and scoring as in training."""

import json

import numpy as np
import pytest

from rayrlhf.config.data import RewardDataSection
from rayrlhf.data.answer_format import AnswerFormat
from rayrlhf.data.supervised.datasets import load_preference_data, load_step_data
from rayrlhf.errors import UserError
from rayrlhf.models.tiny import byte_tokenizer
from rayrlhf.tuning.sample_table import StepTable

ROW = {"prompt": "1+2+3=", "completions": ["1+2=3", "3+3=7"], "labels": [True, False]}
LINE, SPACED = 13, [35, 13]
TRL_IDS = [52, 46, 53, 46, 54, 64, 52, 46, 53, 64, 54, LINE, 54, 46, 54, 64, 58, LINE]
TRL_SPACED = [*TRL_IDS[:11], *SPACED, *TRL_IDS[12:17], *SPACED]
"""Recorded from `trl.experimental.prm.PRMTrainer.tokenize_row` of TRL 1.8.0 (TRL 1.16 has none)."""


def load(folder, rows, tokenizer=None, **settings):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"train": {"path": str(path)}, "chat": False} | settings
    data = RewardDataSection(**given)
    data = data.model_copy(update={"evaluation": data.train})
    return load_step_data(data, tokenizer or byte_tokenizer())[0]


@pytest.mark.parametrize(
    ("separator", "start", "longest", "ids", "right", "wrong"),
    [
        ("\n", None, None, TRL_IDS, 11, 17),
        ("\n", None, 14, TRL_IDS[:14], 11, None),
        ("\n", "<|im_start|>", None, [1, *TRL_IDS], 12, 18),
        ("\n", "<|im_start|>", 14, [1, *TRL_IDS[:13]], 12, None),
        (" \n", None, None, TRL_SPACED, 12, 19),
        (" \n", "<|im_start|>", 14, [1, *TRL_SPACED[:13]], 13, None),
    ],
)
def test_tokens_and_labels_are_those_of_trl(tmp_path, separator, start, longest, ids, right, wrong):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = start
    cut = {} if longest is None else {"max_length": longest, "overlong": "truncate"}
    dataset = load(tmp_path, [ROW], tokenizer, step_separator=separator, **cut)
    (sample,) = dataset.samples
    assert sample.token_ids.tolist() == ids
    assert np.flatnonzero(sample.right).tolist() == [right]
    assert np.flatnonzero(sample.loss_mask).tolist() == [right] + [wrong] * (wrong is not None)
    assert dataset.report.truncated == (longest is not None)


@pytest.mark.parametrize("chat", [True, False])
def test_scoring_tokenizes_as_training_does(tmp_path, chat):
    tokenizer = byte_tokenizer()
    dataset = load(tmp_path, [ROW], chat=chat, system_prompt="Add." if chat else None)
    dataset.format.write(tmp_path)
    stored = AnswerFormat.read(tmp_path)
    ids, ends = stored.step_token_ids(tokenizer, ROW["prompt"], ROW["completions"])
    (sample,) = dataset.samples
    assert sample.token_ids.tolist() == list(ids)
    assert np.flatnonzero(sample.loss_mask).tolist() == ends
    assert ("Add." in tokenizer.decode(ids)) == chat


def test_a_text_is_split_at_the_separator_and_labels_may_be_numbers(tmp_path):
    whole = load(tmp_path, [ROW | {"completions": "1+2=3\n3+3=7\n", "labels": [1, 0]}]).samples[0]
    listed = load(tmp_path, [ROW]).samples[0]
    np.testing.assert_array_equal(whole.token_ids, listed.token_ids)
    np.testing.assert_array_equal(whole.right, listed.right)


def test_a_table_gives_the_samples_back(tmp_path):
    dataset = load(tmp_path, [ROW, ROW | {"prompt": "2+2+2=", "labels": [False, True]}])
    second, first = StepTable.labeled(dataset.samples, dataset.format).take([1, 0])
    for taken, sample in ((first, dataset.samples[0]), (second, dataset.samples[1])):
        np.testing.assert_array_equal(taken.token_ids, sample.token_ids)
        np.testing.assert_array_equal(taken.right, sample.right)
    assert "read as steps with labels: completions, labels, prompt" in "\n".join(dataset.report.lines())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": []}, r"rows\.jsonl: row 1: completions: no steps, expected at least one"),
        ({"labels": [True]}, r"rows\.jsonl: row 1: labels: 1 labels of 2 steps, expected one label per step"),
        ({"labels": [True, -1]}, r"rows\.jsonl: row 1: labels: step 2: expected true or false, found -1"),
        ({"labels": True}, r"rows\.jsonl: row 1: labels: expected a list of true and false, one per step"),
        ({"completions": ["1+2=3", " "]}, r"completions: step 2 is empty"),
        ({"completions": ["1+2\n=3", "7"]}, r"completions: step 1 contains the separator '\\n' \(data\.step_separator\)"),
        ({"completions": "1+2=3 3+3=7"}, r"completions: no separator '\\n' in the text, expected 2 steps"),
        ({"completions": [1, 2]}, r"completions: expected a list of steps as text"),
        ({"prompt": " "}, r"prompt: the prompt is empty"),
    ],
)
def test_a_wrong_row_is_one_line(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, [ROW | change])


@pytest.mark.parametrize("change", [{"completions": []}, {"completions": ["", "a"]}, {"completions": ["a\nb", "c"]}])
def test_rows_without_usable_steps_are_dropped_and_counted_on_demand(tmp_path, change):
    report = load(tmp_path, [ROW, ROW | change], invalid="drop").report
    assert (report.kept, sum(report.dropped.values())) == (1, 1)


def test_a_separator_that_the_tokenizer_cannot_write_is_one_line(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    for separator in ("\n", "<step>"):  # written as nothing, and as unknown tokens
        with pytest.raises(UserError, match=r"data\.step_separator '.*': not found in the vocabulary"):
            load(tmp_path, [ROW], tokenizer, step_separator=separator)


def test_pairs_for_a_process_model_and_steps_for_an_outcome_model_are_one_line(tmp_path):
    pairs = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(UserError, match=r"expected the columns prompt and completions and labels, .* for kind outcome"):
        load(tmp_path, [pairs])
    (tmp_path / "steps.jsonl").write_text(json.dumps(ROW))
    data = RewardDataSection(train={"path": str(tmp_path / "steps.jsonl")})
    with pytest.raises(UserError, match=r"expected the columns chosen and rejected, .* a reward model of kind process"):
        load_preference_data(data, byte_tokenizer())
