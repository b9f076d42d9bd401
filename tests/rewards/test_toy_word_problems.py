"""The quickstart's reward: the order it puts responses into, and that no collapse is worth anything."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.rewards.toy_word_problems import is_correct, is_exact, word_problems, worked_answer, worked_answer_exact

QUESTION = "Mia has 12 pears and buys 5 more. How many pears does she have?"

TABLE = [
    # response, finish reason, score: the answer is 17
    ("12 + 5 = 17\nAnswer: 17", "stop", 1.00),
    ("12 + 5 = 17. Answer: 17", "stop", 1.00),
    ("Answer: 17", "stop", 0.85),
    ("12 + 5 = 17\nAnswer: 17", "length", 0.85),
    ("Mia has 12 + 5 = 17 pears.", "stop", 0.80),
    ("12 + 5 = 17\nAnswer: 17 pears.", "stop", 0.90),
    ("Mia has 12 + 5 = 17 pears.", "length", 0.65),
    ("17", "stop", 0.65),
    ("Mia starts with 12 pears and buys 5. " * 20 + "That is 17", "length", 0.50),
    ("12 + 5 = 18\nAnswer: 18", "stop", 0.50),
    ("12 + 5 = 17, so 3 more.", "stop", 0.55),
    ("12 + 5 = 17, so she has 17 and then buys 3", "length", 0.40),
    ("12 + 5 = 17, so 3 more. Answer: 3", "stop", 0.50),
    ("12 + 5 = 16, or 17, or 18", "length", 0.15),
    ("12 + 5 = 18", "stop", 0.30),
    ("12 + 5 = 18", "length", 0.15),
    ("Answer: 7", "stop", 0.0),
    ("Answer: 12 5", "stop", 0.0),
    ("7", "stop", 0.0),
    ("I cannot help with that.", "stop", 0.0),
    ("", "stop", 0.0),
    ("Answer: " * 1000, "length", 0.0),
    (" ".join(map(str, range(100))), "length", 0.0),
]


def score(response: str, finish_reason: str, question: str = QUESTION, answer: int = 17) -> float:
    return word_problems([question], [response], [answer], [finish_reason])[0]


@pytest.mark.parametrize(("response", "finish_reason", "expected"), TABLE)
def test_the_score_follows_the_table(response: str, finish_reason: str, expected: float):
    assert score(response, finish_reason) == pytest.approx(expected, abs=0.005)


def test_a_right_response_is_worth_more_than_a_wrong_one_of_the_same_form():
    for form in ("{}", "12 + 5 = {}", "12 + 5 = {}\nAnswer: {}", "Answer: {}", "12 and 5 make {} pears. Answer: {} pears"):
        for finish_reason in ("stop", "length"):
            right, wrong = (score(form.replace("{}", number), finish_reason) for number in ("17", "16"))
            assert right >= wrong + 0.5


def problems(count: int) -> list[tuple[str, int, int, int]]:
    draw = random.Random(0)
    pairs = [(draw.randint(2, 20), draw.randint(2, 20)) for _ in range(count)]
    return [(f"Tom has {a} coins and finds {b} more. How many has he?", a, b, a + b) for a, b in pairs]


def mean_score(respond, finish_reason: str = "stop") -> float:
    rows = problems(400)
    return sum(score(respond(a, b), finish_reason, question, answer) for question, a, b, answer in rows) / len(rows)


@pytest.mark.parametrize(
    "constant", ["Answer: 7", "Answer: 20", "20", "Answer: 20 21 22 23 24", "The sum is 20. Answer: 20", ""]
)
def test_a_policy_that_always_says_the_same_earns_next_to_nothing(constant: str):
    honest_without_format = mean_score(lambda a, b: f"He has {a} + {b} = {a + b} coins.")
    assert mean_score(lambda a, b: constant) < 0.1 < 0.75 < honest_without_format


def test_form_without_the_right_number_is_worth_less_than_the_right_number_without_form():
    well_formed_but_wrong = mean_score(lambda a, b: f"{a} + {b} = {a + b + 1}\nAnswer: {a + b + 1}")
    right_but_rambling = mean_score(lambda a, b: f"Well, {a} coins and {b} coins make {a + b}", finish_reason="length")
    assert well_formed_but_wrong == pytest.approx(0.5)
    assert right_but_rambling > well_formed_but_wrong


def test_a_longer_ramble_never_earns_more():
    scores = [score("12 and 5. " + "Well, " * n + "Answer: 17", "stop") for n in range(0, 60, 2)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[-1] == pytest.approx(0.15)


def test_the_bare_question_is_preferred_to_the_prompt_around_it():
    prompt = "Solve in 1 or 2 lines. " + QUESTION
    assert word_problems([prompt], ["1 and 2. Answer: 3"], [17], ["stop"], question=[QUESTION]) == [0.0]


@pytest.mark.parametrize(
    ("response", "correct", "exact"),
    [
        ("12 + 5 = 17\nAnswer: 17", True, True),
        ("Answer: 17\n", True, True),
        ("Answer: 17.", True, False),
        ("answer: 17", True, False),
        ("Answer: 17 pears", True, False),
        ("Answer:17", True, False),
        ("NoAnswer: 17", True, False),
        ("17", True, False),
        ("Answer: 18", False, False),
        ("17 no, Answer: 18", False, False),
        ("", False, False),
    ],
)
def test_exact_asks_for_the_form_and_correct_only_for_the_number(response: str, correct: bool, exact: bool):
    assert (is_correct(response, "#### 17"), is_exact(response, 17)) == (correct, exact)


@given(st.text(max_size=300), st.sampled_from(["stop", "length"]))
def test_the_score_stays_between_zero_and_one(response: str, finish_reason: str):
    assert 0.0 <= score(response, finish_reason) <= 1.0


WORKED = [
    # response to "12 + 5", finish reason, score, exact
    ("12 + 5 = 17 pears.", "stop", 1.0, True),
    ("5 + 12 = 17", "stop", 1.0, True),
    ("17", "stop", 1.0, True),
    ("Mia has 12 pears and buys 5 more, so she has 12 + 5 = 17 pears now.", "stop", 0.90, True),
    ("12 + 5 = 17 pears.", "length", 0.7, False),
    ("12 + 5 = 17 pears." + " So it is." * 10 + " 17", "length", 0.4, False),
    ("12 + 5 = 18 pears.", "stop", 0.3, False),
    ("12 + 5 = 17 pears. Then she has 3", "stop", 0.3, False),
    ("12 + 5 = 18 pears.", "length", 0.21, False),
    ("12 pears + 5 pears = 18 pears", "stop", 0.0, False),
    ("12 - 5 = 7 pears.", "stop", 0.0, False),
    ("12 * 5 = 60", "stop", 0.0, False),
    ("12 + 5 + 1 = 18", "stop", 0.0, False),
    ("12 + 5 pears", "stop", 0.0, False),
    ("", "stop", 0.0, False),
]


def worked(
    response: str, finish: str, solution: str = "12 + 5 = 17 pears. Answer: 17", answer: str = "17"
) -> tuple[float, float]:
    return (
        worked_answer([response], [answer], [solution], [finish])[0],
        worked_answer_exact([response], [answer], [finish])[0],
    )


@pytest.mark.parametrize(("response", "finish", "expected", "exact"), WORKED)
def test_a_worked_answer_is_paid_for_calculation_result_and_end(response: str, finish: str, expected: float, exact: bool):
    score, is_right = worked(response, finish)
    assert (score, is_right) == (pytest.approx(expected, abs=0.005), exact)


def test_order_matters_where_the_operation_has_one():
    assert worked("5 - 12 = 6", "stop", "12 - 5 = 7", "7")[0] == 0.0
    assert worked("12 - 5 = 6", "stop", "12 - 5 = 7", "7")[0] == pytest.approx(0.3)
    assert worked("5 x 12 = 61", "stop", "12 * 5 = 60", "60")[0] == pytest.approx(0.3)


@pytest.mark.parametrize("constant", ["17", "12 + 5 = 17 pears.", "20", "2 + 3 = 5 pens.", "", "12 + 5 = 17 + 3 = 20"])
def test_no_constant_worked_answer_pays(constant: str):
    rows = [(f"{a} + {b} = {a + b}", str(a + b)) for _, a, b, _ in problems(400)]
    scores = [worked(constant, "stop", solution, answer)[0] for solution, answer in rows]
    assert sum(scores) / len(scores) < 0.1


@given(st.text(max_size=200), st.sampled_from(["stop", "length"]))
def test_a_worked_answer_stays_between_zero_and_one_and_a_wrong_one_below_a_right_one(response: str, finish: str):
    score, exact = worked(response, finish)
    assert 0.0 <= score <= 1.0
    assert exact or not score > 0.7
