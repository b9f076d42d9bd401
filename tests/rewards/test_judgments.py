"""Questions to a judge and what follows from its verdicts; no model."""

import math

import numpy as np
import pytest

from rayrlhf.config.judge import JudgeSection
from rayrlhf.data.records import Prompt
from rayrlhf.errors import UserError
from rayrlhf.rewards.functions import ScoringBatch
from rayrlhf.rewards.judgments import (
    REFERENCE,
    Question,
    Verdict,
    agreement,
    check_judge_columns,
    combine,
    judge_columns,
    label_verdict,
    questions,
    text_verdict,
    transcript,
)

NAN = math.nan
BATCH = ScoringBatch(["p", "p", "q"], ["a", "bb", "ccc"], {"answer": ["x", "x", "y"]})
GROUPS = [0, 0, 7]


def section(**settings):
    return JudgeSection.model_validate({"model": {"path": "builtin:tiny"}} | settings)


def scores(judge, verdicts, count=3, groups=(0, 0, 0), batch=None):
    batch = batch or ScoringBatch(["p"] * count, ["r"] * count, {})
    return combine(judge, questions(judge, batch, groups[:count]), verdicts, count)


def test_a_pointwise_question_shows_prompt_response_columns_and_labels_from_worst_to_best():
    judge = section(template="{prompt}|{response}|{answer}|{labels}|{other brace}", labels={"good": 1, "bad": 0})
    assert [one.text for one in questions(judge, BATCH, GROUPS)][1:] == [
        "p|bb|x|bad, good|{other brace}",
        "q|ccc|y|bad, good|{other brace}",
    ]
    assert judge_columns(judge) == {"answer": "reward.judge.template"}
    assert judge_columns(section()) == judge_columns(None) == {}


def test_a_conversation_is_shown_whole():
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}]
    assert transcript(turns) == "user: one\n\nassistant: two\n\nuser: three"
    assert transcript(turns[:1]) == transcript("one") == "one"


def test_what_a_response_says_in_braces_is_not_filled():
    batch = ScoringBatch(["p"], ["{prompt} {answer}"], {"answer": ["secret"]})
    (one,) = questions(section(template="{prompt}: {response} {answer}"), batch, [0])
    assert one.text == "p: {prompt} {answer} secret"


def test_the_score_is_the_expectation_over_the_labels_and_not_their_most_likely_one():
    judge, question = section(), Question("", (0,))
    logprobs = np.log(np.array([0.1, 0.1, 0.2, 0.3, 0.1], np.float32))
    found = label_verdict(judge, question, logprobs)
    assert found.mass == pytest.approx(0.8)
    assert found.values == (pytest.approx((0.1 * 1 + 0.1 * 2 + 0.2 * 3 + 0.3 * 4 + 0.1 * 5) / 0.8 / 4 - 0.25),)
    assert label_verdict(section(labels={"A": 3, "B": -1}), question, logprobs[:2]).values == (pytest.approx(0.5),)


@pytest.mark.parametrize("logprobs", [[-10.0] * 5, [-math.inf] * 5])
def test_labels_that_are_hardly_ever_next_give_no_score(logprobs):
    assert math.isnan(label_verdict(section(), Question("", (0,)), np.array(logprobs, np.float32)).values[0])
    assert math.isnan(label_verdict(section(min_mass=0.0), Question("", (0,)), np.full(5, -np.inf, np.float32)).values[0])


@pytest.mark.parametrize(
    ("settings", "subjects", "text", "values"),
    [
        ({}, (0,), "Score: 3, no.\nScore: 7", (0.7,)),
        ({"low": 1, "high": 5, "verdict": r"<(\d)>"}, (0,), "<3>", (0.5,)),
        ({}, (0,), "Score: 11", (NAN,)),
        ({}, (0,), "fine", (NAN,)),
        ({"mode": "pairwise"}, (0, 1), "Better: B", (0.0, 1.0)),
        ({"mode": "pairwise"}, (0, 1), "Better: C", (NAN, NAN)),
        ({"mode": "pairwise", "verdict": "best: (Answer [AB])"}, (0, 1), "best: Answer B", (0.0, 1.0)),
        ({"mode": "listwise", "verdict": "best: ([A-Z]+)"}, (0, 1, 2), "best: BCA", (0.0, 1.0, 0.5)),
        ({"mode": "listwise"}, (0, 1, 2), "Ranking: B > C > A", (0.0, 1.0, 0.5)),
        ({"mode": "listwise"}, (0, 1, 2), "Ranking: B > A", (NAN, NAN, NAN)),
        ({"mode": "listwise"}, (0, 1, 2), "Ranking: B > A > A", (NAN, NAN, NAN)),
    ],
)
def test_completions_are_read_by_their_last_verdict(settings, subjects, text, values):
    found = text_verdict(section(score="text", **settings), Question("", subjects), text).values
    assert found == pytest.approx(values, nan_ok=True)


def test_a_rubric_is_the_weighted_mean_of_its_criteria_and_needs_all_of_them():
    judge = section(criteria=[{"name": "true", "text": "Is it true?", "weight": 3}, {"name": "short", "text": "Is it short?"}])
    asked = questions(judge, BATCH, GROUPS)
    assert ["Is it true?" in one.text for one in asked] == [True] * 3 + [False] * 3
    parts = combine(judge, asked, [Verdict((value,), 0.5) for value in (1.0, 0.0, 0.5, 0.0, 1.0, NAN)], 3)
    np.testing.assert_allclose(parts["judge_model"], [0.75, 0.25, NAN])
    np.testing.assert_allclose(parts["judge_model_true"], [1, 0, NAN])
    np.testing.assert_allclose(parts["judge_model_short"], [0, 1, NAN])
    np.testing.assert_allclose(parts["judge_model_mass"], [0.5, 0.5, NAN])
    assert {part.dtype for part in parts.values()} == {np.dtype(np.float32)}


def test_votes_are_averaged_without_those_that_have_no_verdict_and_their_agreement_is_reported():
    judge = section(score="text", votes=4, temperature=1.0)
    votes = [Verdict((value,)) for value in (1, 1, 0, 0, 0.5, 0.5, NAN, 0.5, NAN, NAN, NAN, 0.25)]
    parts = scores(judge, votes)
    np.testing.assert_allclose(parts["judge_model"], [0.5, 0.5, 0.25])
    np.testing.assert_allclose(parts["judge_model_agreement"], [0.0, 1.0, NAN])
    assert "judge_model_mass" not in parts
    assert agreement([0.0, 1.0, 1.0, 1.0]) == pytest.approx(0.25)


def test_pairs_are_shown_in_both_orders_and_a_preference_for_a_place_cancels():
    judge = section(mode="pairwise", template="{prompt} {first}/{second}")
    asked = questions(judge, ScoringBatch(["p"] * 3, ["a", "b", "c"], {}), [0, 0, 0])
    assert [one.text for one in asked] == ["p a/b", "p b/a", "p a/c", "p c/a", "p b/c", "p c/b"]
    first_place = [Verdict((0.9, 0.1))] * 6
    parts = combine(judge, asked, first_place, 3)
    np.testing.assert_allclose(parts["judge_model"], [0.5] * 3)
    np.testing.assert_allclose(parts["judge_model_agreement"], [0.2] * 3, atol=1e-6)
    order = {"a": 2, "b": 0, "c": 1}
    true = [Verdict((1.0, 0.0) if order[one.text[2]] > order[one.text[4]] else (0.0, 1.0)) for one in asked]
    parts = combine(judge, asked, true, 3)
    np.testing.assert_allclose(parts["judge_model"], [1.0, 0.0, 0.5])
    np.testing.assert_allclose(parts["judge_model_agreement"], [1.0] * 3)


def test_opponents_are_the_neighbors_around_the_group_and_groups_are_not_mixed():
    judge = section(mode="pairwise", opponents=1, template="{first}{second}")
    texts = [one.text for one in questions(judge, ScoringBatch(["p"] * 6, [*"abcdxy"], {}), [0, 0, 0, 0, 9, 9])]
    assert texts[::2] == ["ab", "ad", "bc", "cd", "xy"]


def test_a_reference_joins_each_group_and_gets_no_score():
    judge = section(mode="pairwise", against="answer", template="{first}{second}")
    asked = questions(judge, BATCH, GROUPS)
    assert [one.subjects for one in asked[::2]] == [(0, 1), (0, REFERENCE), (1, REFERENCE), (2, REFERENCE)]
    assert asked[-1].text == "yccc"
    assert judge_columns(judge) == {"answer": "reward.judge.against"}
    parts = combine(judge, asked, [Verdict((1.0, 0.0)), Verdict((0.0, 1.0))] * 4, 3)
    np.testing.assert_allclose(parts["judge_model"], [1.0, 0.5, 1.0])


def test_listwise_shows_all_responses_in_several_orders():
    judge = section(mode="listwise", votes=3, template="{answers}")
    asked = questions(judge, ScoringBatch(["p"] * 3, ["a", "b", "c"], {}), [0, 0, 0])
    assert [one.subjects for one in asked] == [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
    assert asked[1].text == "<answer A>\nb\n</answer A>\n\n<answer B>\nc\n</answer B>\n\n<answer C>\na\n</answer C>"
    always_first = [label_verdict(judge, one, np.log(np.array([0.8, 0.1, 0.1], np.float32))) for one in asked]
    np.testing.assert_allclose(combine(judge, asked, always_first, 3)["judge_model"], [1 / 3] * 3, rtol=1e-6)


def test_listwise_votes_beyond_the_orders_are_other_completions_or_left_out():
    batch = ScoringBatch(["p"] * 2, ["a", "b"], {})
    asked = questions(section(mode="listwise", votes=5, score="text", temperature=1.0), batch, [0, 0])
    assert [(one.subjects, one.vote) for one in asked] == [((0, 1), 0), ((0, 1), 1), ((0, 1), 2), ((1, 0), 0), ((1, 0), 1)]
    for settings in ({}, {"score": "text"}):
        asked = questions(section(mode="listwise", votes=5, **settings), batch, [0, 0])
        assert [(one.subjects, one.vote) for one in asked] == [((0, 1), 0), ((1, 0), 0)]


def test_pairs_come_from_groups_of_any_size():
    judge = section(mode="pairwise", opponents=1)
    assert len(questions(judge, ScoringBatch(["p"] * 27, ["r"] * 27, {}), [0] * 27)) == 2 * 27
    with pytest.raises(UserError, match="prompt 0 has 1 responses to compare, expected at least 2; set rollout"):
        questions(judge, ScoringBatch(["p"], ["r"], {}), [0])


@pytest.mark.parametrize("settings", [{"template": "{response} {answer}"}, {"mode": "pairwise", "against": "answer"}])
def test_null_in_a_column_of_the_judge_is_refused_with_its_row(settings):
    ids, judge = np.ones(1, np.int32), section(**settings)
    message = r"^reward.judge: column 'answer' is null in row 7; reward.judge.(template|against) needs a value in every row$"
    with pytest.raises(UserError, match=message):
        check_judge_columns(judge, [Prompt(0, "p", ids, {"answer": "x"}), Prompt(7, "q", ids, {"answer": None})])
    with pytest.raises(UserError, match=message):
        questions(judge, ScoringBatch(BATCH.prompts, BATCH.responses, {"answer": ["x", "x", None]}), GROUPS)
    check_judge_columns(section(), [Prompt(7, "q", ids, {"answer": None})])


@pytest.mark.parametrize("groups", [[0, 0, 1], [0] * 27])
def test_groups_that_cannot_be_compared_are_refused(groups):
    batch = ScoringBatch(["p"] * len(groups), ["r"] * len(groups), {})
    with pytest.raises(UserError, match=r"reward.judge.mode 'listwise': prompt \d has (1|27) responses to compare, expected 2"):
        questions(section(mode="listwise"), batch, groups)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"score": "text", "votes": 3, "temperature": 1.0},
        {"mode": "pairwise", "opponents": 2},
        {"mode": "listwise", "votes": 2, "against": "answer", "criteria": [{"name": "a", "text": "b"}]},
    ],
)
def test_a_configuration_that_names_all_keys_is_read_as_it_was_written(settings):
    judge = section(**settings)
    assert JudgeSection.model_validate(judge.model_dump(mode="json")) == judge


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": {"1": 1}}, "at least 2"),
        ({"labels": {"a": 1, "b": 1}}, "labels: all have the same value"),
        ({"votes": 3}, "votes 3 would all be equal"),
        ({"votes": 3, "score": "text"}, "votes 3 would all be equal"),
        ({"temperature": 1.0}, "temperature has no effect with score 'logprobs'"),
        ({"min_mass": 0.5, "score": "text"}, "min_mass has no effect with score 'text'"),
        ({"labels": {"A": 1, "B": 0}, "mode": "pairwise"}, "labels has no effect with mode 'pairwise'"),
        ({"opponents": 2}, "opponents has no effect with mode 'pointwise'"),
        ({"against": "answer"}, "against has no effect with mode 'pointwise'"),
        ({"score": "text", "verdict": "("}, "verdict '\\('"),
        ({"score": "text", "verdict": "x"}, "expected one group in parentheses, found 0"),
        ({"score": "text", "low": 3, "high": 3}, "expected low < high"),
        ({"template": "{prompt}"}, r"template has no \{response\}"),
        ({"template": "{first}", "mode": "pairwise"}, r"template has no \{second\}"),
        ({"template": "{response}", "criteria": [{"name": "a", "text": "b"}]}, r"template has no \{criterion\}"),
        ({"template": "{response} {criterion}"}, "there are no criteria"),
        ({"criteria": [{"name": "mass", "text": "b"}]}, "criteria: the name 'mass' is taken"),
        ({"model": {"path": "m", "lora": {}}}, "model.lora has no effect"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        section(**settings)
