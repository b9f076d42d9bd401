"""Messages and chat templates: what is refused, and that rendering is the tokenizer's own."""

import pytest

from rayrlhf.config.data import SupervisedDataSection
from rayrlhf.data.supervised.datasets import supervised_recipe
from rayrlhf.data.supervised.encoding import encode_batch
from rayrlhf.data.templates import check_messages, conversation, last_user_text, render, require_chat_template, unwritten_keys
from rayrlhf.errors import UserError
from rayrlhf.models.tiny import byte_tokenizer

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Hello"}


def test_a_conversation_keeps_its_messages_and_the_keys_that_a_template_may_read():
    assert check_messages([SYSTEM, USER, ANSWER, {**USER, "id": 7, "name": None}], "f") == [
        SYSTEM,
        USER,
        ANSWER,
        {**USER, "id": 7},
    ]


THINKING = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_reasoning_is_learnt_where_the_template_renders_it_and_never_lost_without_a_word():
    tokenizer = byte_tokenizer()
    row = {"messages": [USER, {**ANSWER, "reasoning_content": "three and four make seven"}]}
    data = SupervisedDataSection.model_validate({"train": {"path": "rows.jsonl"}})

    def learnt():
        recipe = supervised_recipe(row, 1, data.train, data, tokenizer)
        (sample,), _ = encode_batch([row], [1], recipe, tokenizer)
        return tokenizer.decode(sample.token_ids[sample.loss_mask])

    with pytest.raises(UserError, match=r"^row 1: reasoning_content: the chat template does not write it; "):
        unwritten_keys(tokenizer, [row["messages"]], ["row 1"], [None])
    tokenizer.chat_template = THINKING
    assert learnt() == "<think>three and four make seven</think>Hello<|im_end|>\n"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "f: the conversation is empty"),
        (["Hi"], "f: message 1: expected {role, content}, found 'Hi'"),
        ([USER, {"role": "user"}], "f: message 2: expected {role, content}, found {'role': 'user'}"),
        ([{"role": "user", "content": None}], "f: message 1: expected text in role and content"),
        ([{"role": "usr", "content": "x"}], "f: message 1: unknown role 'usr'; did you mean user?"),
        ([{"role": "zzz", "content": "x"}], "expected one of system, user, assistant, tool"),
        ([USER, ANSWER], "f: the last message is from the assistant, expected the user's"),
        ([SYSTEM], "f: the last message is from the system"),
        ([{**USER, "tool_calls": [{}]}], "f: message 1: tool_calls: expected in the assistant's messages only"),
    ],
)
def test_a_wrong_message_is_named(value, message):
    with pytest.raises(UserError) as caught:
        check_messages(value, "f")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_system_prompt_goes_first_unless_the_row_has_its_own():
    assert conversation("Hi", None) == [USER]
    assert conversation("Hi", "Be brief.") == [SYSTEM, USER]
    assert conversation([USER, ANSWER, USER], "Be brief.") == [SYSTEM, USER, ANSWER, USER]
    own = [{"role": "system", "content": "Be kind."}, USER]
    assert conversation(own, "Be brief.") == own


def test_the_last_user_turn_is_what_the_user_wrote():
    assert last_user_text("Hi") == "Hi"
    assert last_user_text([USER, ANSWER, {"role": "user", "content": "Why?"}, {"role": "tool", "content": "3"}]) == "Why?"
    assert last_user_text([{"role": "tool", "content": "3"}]) == ""


def test_rendering_is_the_chat_template_opened_for_an_answer(tokenizer):
    texts = render(tokenizer, [[USER], [SYSTEM, USER]], ["a", "b"])
    for text, messages in zip(texts, ([USER], [SYSTEM, USER]), strict=True):
        assert text == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text.endswith("<|im_start|>assistant\n")


def test_a_conversation_that_the_template_refuses_is_named(tokenizer):
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}x"
    with pytest.raises(UserError, match=r"^row 2: the chat template refuses this conversation: no system turns$"):
        render(tokenizer, [[USER], [SYSTEM, USER], [USER]], ["row 1", "row 2", "row 3"])


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer):
    require_chat_template(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no chat template; set model.chat_template to a Jinja file, or data.chat to false"):
        require_chat_template(tokenizer)
