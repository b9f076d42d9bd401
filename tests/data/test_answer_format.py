"""A reward model scores what it was trained to read: the format stored beside it makes the very tokens of its pairs."""

import numpy as np
import pytest

from rayrlhf.config.data import PreferenceDataSection
from rayrlhf.data.answer_format import FORMAT_FILE, AnswerFormat
from rayrlhf.data.supervised.datasets import load_preference_data
from rayrlhf.errors import UserError
from rayrlhf.models.tiny import byte_tokenizer
from tests.data.supervised_files import assistant, merging_tokenizer, preferences, user, write_rows

EXPLICIT = {"prompt": "4 + 42 =", "chosen": " 46", "rejected": " 47"}
IMPLICIT = {"chosen": "4 + 42 = 46", "rejected": "4 + 42 = 47"}
MESSAGES = {"prompt": [user("4 + 42 =")], "chosen": [assistant(" 46")], "rejected": [assistant(" 47")]}


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), merging_tokenizer()], ids=["bytes", "merging"])
@pytest.mark.parametrize(
    ("row", "data"),
    [
        (EXPLICIT, {}),
        (EXPLICIT, {"system_prompt": "Add."}),
        (EXPLICIT, {"chat": False}),
        (IMPLICIT, {}),
        (MESSAGES, {"system_prompt": "Add.", "chat": False}),
    ],
    ids=["chat", "system prompt", "plain", "implicit prompt", "messages"],
)
def test_the_stored_format_makes_the_tokens_of_the_pairs(tokenizer, row, data, tmp_path):
    tokenizer.chat_template = byte_tokenizer().chat_template
    dataset = preferences(tmp_path, [row], tokenizer, **data)
    dataset.format.write(tmp_path)
    found = AnswerFormat.read(tmp_path)
    np.testing.assert_array_equal(found.token_ids(tokenizer, "4 + 42 =", " 46"), dataset.samples[0].chosen.token_ids)
    np.testing.assert_array_equal(found.token_ids(tokenizer, "4 + 42 =", " 47"), dataset.samples[0].rejected.token_ids)


@pytest.mark.parametrize("data", [{}, {"system_prompt": "Add."}], ids=["chat", "system prompt"])
def test_a_conversation_is_scored_with_all_of_its_turns(data, tmp_path):
    prompt = [user("Hi."), assistant("Hello."), user("4 + 42 =")]
    row = {"chosen": [*prompt, assistant("46")], "rejected": [*prompt, assistant("47")]}
    tokenizer = byte_tokenizer()
    dataset = preferences(tmp_path, [row], tokenizer, **data)
    np.testing.assert_array_equal(dataset.format.token_ids(tokenizer, prompt, "46"), dataset.samples[0].chosen.token_ids)
    plain = AnswerFormat(chat=False)
    assert plain.token_ids(tokenizer, prompt, "46") == plain.token_ids(tokenizer, "4 + 42 =", "46")


def test_what_is_held_out_keeps_the_format(tmp_path):
    rows = [EXPLICIT | {"prompt": f"{number} + 1 ="} for number in range(8)]
    path = write_rows(tmp_path, rows)
    section = PreferenceDataSection.model_validate({"train": {"path": str(path)}, "chat": False, "evaluation_share": 0.5})
    train, held_out = load_preference_data(section, byte_tokenizer())
    assert train.format == held_out.format == AnswerFormat(chat=False, end=byte_tokenizer().eos_token)


def test_a_response_that_brings_its_end_gets_no_second_one():
    tokenizer = byte_tokenizer()
    plain = AnswerFormat(chat=False, end=tokenizer.eos_token)
    assert plain.token_ids(tokenizer, "a", "b" + tokenizer.eos_token) == plain.token_ids(tokenizer, "a", "b")
    assert plain.token_ids(tokenizer, "a", "b")[-1] == tokenizer.eos_token_id


def test_a_folder_without_a_format_has_none(tmp_path):
    assert AnswerFormat.read(tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"chta": true}', '{"chat": "yes"}', '{"chat": true, "end": 3}'])
def test_a_broken_format_file_is_named_in_one_line(content, tmp_path):
    (tmp_path / FORMAT_FILE).write_text(content)
    with pytest.raises(UserError, match=FORMAT_FILE) as caught:
        AnswerFormat.read(tmp_path)
    assert "\n" not in str(caught.value)
