"""Prompt datasets: tokens as the tokenizer itself makes them, long prompts handled as asked, mistakes traced to the row."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayrlhf.config.data import DataSection, DatasetSection
from rayrlhf.data import prompt_datasets as prompts_module
from rayrlhf.data.prompt_datasets import load_prompt_dataset, prepare_prompts
from rayrlhf.errors import UserError

message = st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), st.text())
chat = st.lists(message, max_size=3).map(lambda turns: [*turns, {"role": "user", "content": "end"}])
filled = st.text(min_size=1).filter(lambda text: text.strip())


def write(path: Path, rows: list[dict]) -> DatasetSection:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetSection(path=str(path))


def data(train: DatasetSection, **fields: object) -> DataSection:
    return DataSection(train=train, **fields)


def message_of(section: DatasetSection, tokenizer, limit: int = 999, **fields: object) -> str:
    with pytest.raises(UserError) as caught:
        prepare_prompts(section, data(section, **fields), tokenizer, limit)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(st.lists(filled | chat, min_size=1, max_size=7), st.none() | filled, st.booleans())
def test_tokens_are_those_of_the_tokenizers_own_chat_template(tmp_path, tokenizer, values, system, through_template):
    section = write(tmp_path / "a.jsonl", [{"prompt": value, "n": i} for i, value in enumerate(values)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts_module, "_CHUNK", 3)
        loaded = prepare_prompts(section, data(section, chat=through_template, system_prompt=system), tokenizer, 10**6)
    assert [(prompt.id, prompt.columns) for prompt in loaded.prompts] == [(i, {"n": i}) for i in range(len(values))]
    for prompt, value in zip(loaded.prompts, values, strict=True):
        if isinstance(value, str) and not through_template:
            expected = tokenizer(value)["input_ids"]
        else:
            turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
            turns = turns if system is None else [{"role": "system", "content": system}, *turns]
            expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert prompt.token_ids.dtype == np.int32
        assert prompt.token_ids.tolist() == expected
        assert prompt.text == (value if isinstance(value, str) else "end")


def test_the_template_goes_around_the_prompt_and_other_columns_stay(tmp_path, tokenizer):
    section = write(tmp_path / "a.jsonl", [{"question": "1+1?", "answer": "2"}])
    section = section.model_copy(update={"prompt_field": "question", "template": "Q: {prompt} {{kept}}\nA:"})
    (prompt,) = load_prompt_dataset(section, data(section, chat=False), tokenizer, 99)
    assert tokenizer.decode(prompt.token_ids) == prompt.text == "Q: 1+1? {kept}\nA:"
    assert prompt.columns == {"answer": "2"}


def test_long_prompts_lose_their_left_side_or_are_dropped_with_their_ids_kept(tmp_path, tokenizer, caplog):
    section = write(tmp_path / "a.jsonl", [{"prompt": "abc"}, {"prompt": "abcdefgh"}, {"prompt": "xyz"}])
    cut = prepare_prompts(section, data(section, chat=False, overlong="truncate"), tokenizer, 4)
    assert [tokenizer.decode(prompt.token_ids) for prompt in cut.prompts] == ["abc", "efgh", "xyz"]
    assert (cut.truncated, cut.dropped) == (1, 0)
    dropped = prepare_prompts(section, data(section, chat=False, overlong="drop"), tokenizer, 4)
    assert [prompt.id for prompt in dropped.prompts] == [0, 2]
    assert (dropped.truncated, dropped.dropped) == (0, 1)
    with caplog.at_level(logging.WARNING):
        load_prompt_dataset(section, data(section, chat=False, overlong="drop"), tokenizer, 4)
    assert "dropped 1 of 3 prompts above 4 tokens" in caplog.text


def test_a_prompt_of_exactly_the_limit_fits(tmp_path, tokenizer):
    section = write(tmp_path / "a.jsonl", [{"prompt": "abcd"}])
    assert len(prepare_prompts(section, data(section, chat=False), tokenizer, 4).prompts) == 1


def test_a_prompt_that_is_too_long_is_named(tmp_path, tokenizer):
    section = write(tmp_path / "a.jsonl", [{"prompt": "abc"}, {"prompt": "abcde"}])
    assert message_of(section, tokenizer, 4, chat=False).startswith(
        f"{tmp_path}/a.jsonl: row 2: prompt: 5 tokens, expected at most 4; set data.overlong"
    )
    assert "all 2 prompts are longer than 2 tokens" in message_of(section, tokenizer, 2, chat=False, overlong="drop")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x", "n": 1}, "row 2: prompt: the row has no such field, only question, n"),
        ({}, "row 2: prompt: the row has no such field, only none"),
        ({"prompt": 3}, "row 2: prompt: expected text or a list of {role, content}, found int"),
        ({"prompt": None}, "row 2: prompt: expected text or a list of {role, content}, found NoneType"),
        ({"prompt": " \n"}, "row 2: prompt: the prompt is empty"),
        ({"prompt": []}, "row 2: prompt: the conversation is empty"),
        ({"prompt": [{"role": "user", "text": "x"}]}, "row 2: prompt: message 1: expected {role, content}"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, tokenizer, row, message):
    section = write(tmp_path / "a.jsonl", [{"prompt": "fine"}, row])
    assert f"{tmp_path}/a.jsonl: {message}" in message_of(section, tokenizer)


def test_without_a_chat_template_only_plain_text_works(tmp_path, tokenizer):
    tokenizer.chat_template = None
    section = write(tmp_path / "a.jsonl", [{"prompt": "fine"}])
    assert len(prepare_prompts(section, data(section, chat=False), tokenizer, 9).prompts) == 1
    assert "has no chat template" in message_of(section, tokenizer)
    conversational = write(tmp_path / "b.jsonl", [{"prompt": [{"role": "user", "content": "x"}]}])
    assert "has no chat template" in message_of(conversational, tokenizer, chat=False)


def test_plain_text_gets_the_tokenizers_own_start_token_and_chat_text_does_not_get_a_second_one(tmp_path, tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 0)])
    section = write(tmp_path / "a.jsonl", [{"prompt": "hi"}])
    plain = prepare_prompts(section, data(section, chat=False), tokenizer, 99).prompts[0]
    assert plain.token_ids.tolist()[:1] == [0]
    chat = prepare_prompts(section, data(section), tokenizer, 99).prompts[0]
    assert 0 not in chat.token_ids


def test_built_in_word_problems_load_without_naming_their_field(tokenizer):
    section = DatasetSection(path="builtin:word-problems", limit=3)
    loaded = load_prompt_dataset(section, data(section), tokenizer, 500)
    assert len(loaded) == 3
    assert loaded[0].columns["answer"].isdecimal()
    assert loaded[0].text in tokenizer.decode(loaded[0].token_ids)
