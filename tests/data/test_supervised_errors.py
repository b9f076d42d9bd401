"""Every bad row is named in one line, with file, row, field and what was expected, before any model loads."""

import pytest

from tests.data.supervised_files import assistant, error_of, preferences, supervised, user

PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}


@pytest.mark.parametrize(
    ("rows", "train", "data", "message"),
    [
        (
            [{"chosen": "a", "rejected": "b"}],
            {},
            {},
            "row 1: expected the columns text, or messages, or prompt and completion, or input_ids, "
            "found chosen, rejected; these are preference pairs, of which SFT learns the better answer with text_field=chosen",
        ),
        ([{"prompt": "a"}], {}, {}, "these are prompts alone, for PPO and not for SFT"),
        ([{"prompt": "a", "completions": "b"}], {}, {}, "; is completions meant to be completion?"),
        ([{"question": "a", "answer": "b"}], {}, {}, "; name them with text_field, messages_field, prompt_field"),
        ([{"text": "a"}], {"format": "messages"}, {}, "row 1: expected the columns messages, found text"),
        ([{"text": "a", "messages": [user("x"), assistant("y")]}], {}, {}, "set format to one of text, messages"),
        ([{"text": "a", "tools": [{"name": "f"}]}], {}, {}, "row 1: tools: not supported"),
        ([{"text": "a"}, {"prompt": "a", "completion": "b"}], {}, {}, "row 2: text: missing or null, expected as in"),
        ([{"text": "a"}, {"text": None}], {}, {}, "row 2: text: missing or null"),
        ([{"text": 3}], {}, {}, "row 1: text: expected text, found int"),
        ([{"text": "a"}, {"text": [user("x")]}], {}, {}, "row 2: text: expected text as in the first row, found a list"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": [user("a")], "completion": [assistant("b")]}],
            {},
            {},
            "row 2: prompt: expected text as in the first row, found a list",
        ),
        ([{"prompt": [user("a")], "completion": "b"}], {}, {}, "row 1: completion: expected a list of {role, content}"),
        ([{"messages": {"role": "user"}}], {}, {}, "row 1: messages: expected a list of {role, content}, found dict"),
        ([{"messages": [user("a")]}], {}, {}, "row 1: messages: the last message is from the user, expected the assistant's"),
        ([{"messages": [user("a"), assistant(" ")]}], {}, {}, "row 1: messages: message 2: the assistant's content is empty"),
        (
            [{"messages": [user("a"), {"role": "assistant", "content": "", "tool_calls": [1]}]}],
            {},
            {},
            "message 2: tool_calls: expected a list of calls, found [1]",
        ),
        ([{"messages": [assistant("a")]}], {}, {}, "row 1: message 1 is from the assistant, expected the user's"),
        ([{"messages": [{"from": "human", "text": "a"}]}], {}, {}, "row 1: messages: message 1: expected {role, content}"),
        (
            [{"prompt": [user("a"), assistant("b")], "completion": [assistant("c")]}],
            {},
            {},
            "row 1: prompt: the last message is from",
        ),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}],
            {},
            {},
            "row 2: completion: empty, expected text to learn from; correct it, or set data.invalid to drop",
        ),
        ([{"prompt": "", "completion": "b"}], {}, {}, "row 1: prompt: the prompt is empty"),
        ([{"text": "a"}], {"group_field": "topic"}, {}, "row 1: topic: missing or null"),
        ([{"text": "a"}], {}, {"loss_on": "completion"}, "loss_on completion: expected prompts with completions"),
        ([{"text": "a"}], {}, {"loss_on": "assistant"}, "loss_on assistant: expected conversations, found plain text"),
        ([{"input_ids": [1, 2, 99999]}], {}, {}, "row 1: token 99999: expected 0 to "),
        ([{"input_ids": [1, "b"]}], {}, {}, "row 1: input_ids: expected a list of token ids, found list"),
        ([{"input_ids": []}], {}, {}, "row 1: input_ids: empty, expected tokens to learn from"),
        ([{"input_ids": [1]}], {}, {}, "row 1: not one token to learn"),
        ([{"input_ids": [1, 2]}], {}, {"loss_on": "assistant"}, "expected conversations, found plain text (tokens)"),
        ([{"text": "a"}], {}, {"system_prompt": "S"}, "data.system_prompt: has no effect with plain text"),
        (
            [{"prompt": "a", "completion": "b"}],
            {},
            {"chat": False, "loss_on": "assistant"},
            "found plain text (prompt-completion)",
        ),
    ],
)
def test_a_bad_sample_is_named(tmp_path, tokenizer, rows, train, data, message):
    assert message in error_of(supervised, tmp_path, rows, tokenizer, train, **data)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}],
            "expected the columns chosen and rejected, found prompt, completion; these are completions",
        ),
        ([{"promt": "a", "chosen": "b", "rejected": "c"}], "row 1: unknown column promt; did you mean prompt?"),
        ([{**PAIR, "margins": 1}], "row 1: unknown column margins; did you mean margin? (or set margin_field to margins)"),
        ([{"prompt": "a", "chosen": "b", "reject": "c"}], "is reject meant to be rejected?"),
        ([{**PAIR, "rejected": "4"}], "row 1: chosen and rejected are equal, expected a better"),
        ([PAIR, {**PAIR, "chosen": " "}], "row 2: chosen: empty"),
        ([PAIR, {**PAIR, "rejected": ["5"]}], "row 2: rejected: expected text as in the first row, found a list"),
        ([PAIR, {"chosen": "a", "rejected": "b"}], "row 2: prompt: missing or null, expected as in the first row (preference)"),
        ([{"chosen": "a", "rejected": "b"}, PAIR], "row 2: prompt: expected as in the first row, which has none"),
        ([PAIR, {**PAIR, "margin": 1}], "row 2: margin: expected as in the first row, which has none"),
        ([{**PAIR, "margin": 1}, PAIR], "row 2: margin: missing or null"),
        ([{**PAIR, "margin": "1"}], "row 1: margin: expected a finite number, found '1'"),
        ([{**PAIR, "margin": True}], "row 1: margin: expected a finite number, found True"),
        ([{"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}], "begin with different messages"),
        ([{"chosen": [user("a"), assistant("b")], "rejected": [user("a"), user("d")]}], "rejected: the last message is from"),
    ],
)
def test_a_bad_pair_is_named(tmp_path, tokenizer, rows, message):
    assert message in error_of(preferences, tmp_path, rows, tokenizer)
