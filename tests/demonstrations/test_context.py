"""A context shows what was chosen, as it should, and no more than fits."""

import pytest

from rayrlhf.demonstrations.choosing import Order
from rayrlhf.demonstrations.context import TextForm, as_messages, as_text, fit
from rayrlhf.demonstrations.example import Example
from rayrlhf.errors import UserError

SHOWN = [Example("a", "one", "1"), Example("b", "two", "2"), Example("c", "three", "3")]
FORM = TextForm(question="Q: {prompt}\nA: ", separator="\n--\n")


def test_turns_alternate_and_end_with_the_question() -> None:
    messages = as_messages(SHOWN[:2], "four", "turns", FORM, "Be brief.")
    assert [(message["role"], message["content"]) for message in messages] == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "1"),
        ("user", "two"),
        ("assistant", "2"),
        ("user", "four"),
    ]


def test_a_system_block_holds_the_system_prompt_and_all_demonstrations() -> None:
    system, question = as_messages(SHOWN[:2], "four", "system", FORM, "Be brief.")
    assert system == {"role": "system", "content": "Be brief.\n\nQ: one\nA: 1\n--\nQ: two\nA: 2"}
    assert question == {"role": "user", "content": "four"}


@pytest.mark.parametrize("layout", ["turns", "system"])
def test_without_demonstrations_every_layout_is_the_bare_question(layout: str) -> None:
    assert as_messages([], "four", layout, FORM) == [{"role": "user", "content": "four"}]  # type: ignore[arg-type]
    assert as_text([], "four", FORM) == "Q: four\nA: "


def test_plain_text_ends_where_the_answer_begins_and_takes_braces_in_prompts() -> None:
    assert as_text([Example("a", "{x}", "{prompt}")], "{0}", FORM) == "Q: {x}\nA: {prompt}\n--\nQ: {0}\nA: "


def test_a_question_form_without_a_place_for_the_prompt_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"expected \{prompt\} in it"):
        TextForm(question="Q: ")


@pytest.mark.parametrize(
    ("order", "budget", "kept"),
    [
        ("far_to_near", 99, ["c", "b", "a"]),
        ("near_to_far", 99, ["a", "b", "c"]),
        ("far_to_near", 5, ["b", "a"]),
        ("near_to_far", 5, ["a", "b"]),
        ("near_to_far", 1, []),
    ],
)
def test_the_farthest_are_dropped_first_and_counted(order: Order, budget: int, kept: list[str]) -> None:
    fitted = fit(
        SHOWN,
        order,
        lambda shown: as_text(shown, "four", TextForm("{prompt} ", " ")),
        lambda t: len(t.split()),
        budget,
        "row 1",
    )
    assert [example.identity for example in fitted.demonstrations] == kept
    assert fitted.dropped == 3 - len(kept)
    assert fitted.tokens == 2 * len(kept) + 1 == len(fitted.context.split())


def test_a_question_over_the_budget_is_named() -> None:
    with pytest.raises(UserError, match="row 7: the question has 4 tokens without any demonstration, expected at most 3"):
        fit(SHOWN, "near_to_far", lambda shown: as_text(shown, "four", TextForm("{prompt}", "")), len, 3, "row 7")
