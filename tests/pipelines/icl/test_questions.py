"""Questions of a curve: leak-proof, nested, within the context, spoiled where they are to be."""

import json

import pytest

from rayrlhf.config.icl import ShotsSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import ContextSection
from rayrlhf.demonstrations.choosing import ChoiceCounts
from rayrlhf.demonstrations.example import Example
from rayrlhf.demonstrations.ranking import RandomRanker
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_tokenizer
from rayrlhf.pipelines.icl.questions import QuestionBuilder

POOL = [Example(f"d:{number}", f"item {number} of the list", "even" if number % 2 == 0 else "odd") for number in range(12)]
TWINS = [Example("other:1", "Item 3  of the LIST", "odd"), Example("other:2", "item 3 of the list", "odd")]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelSection(path="builtin:tiny?layers=1&hidden=64"))


def asked(tokenizer, targets=POOL[:4], pool=(*POOL, *TWINS), *, budget=4096, system=None, layout="turns", **shots):
    counts = ChoiceCounts()
    builder = QuestionBuilder(ShotsSection(**shots), ContextSection(layout=layout), system, tokenizer, budget)
    rows = list(builder.rows(targets, pool, lambda seed: RandomRanker(len(pool), seed), counts))
    return rows, counts


def shown(row):
    return [turn["content"] for turn in json.loads(row["messages"]) if turn["role"] == "user"][:-1]


def test_every_target_is_asked_under_every_seed_and_count(tokenizer):
    rows, _ = asked(tokenizer, counts=[0, 2, 5], seeds=2)
    assert [(row["seed"], row["source"], row["k"]) for row in rows] == [
        (seed, source, k) for seed in range(2) for source in range(4) for k in (0, 2, 5)
    ]
    assert all(row["shown"] == row["k"] == len(shown(row)) for row in rows)


def test_no_context_holds_the_question_itself_or_its_twin(tokenizer):
    rows, counts = asked(tokenizer, counts=[11], seeds=4)
    for row in rows:
        assert row["question"].casefold() not in {" ".join(text.casefold().split()) for text in shown(row)}
    assert counts.leaks["itself"] > 0
    assert counts.leaks["same_text"] > 0


def test_more_demonstrations_contain_those_of_fewer_with_the_nearest_next_to_the_question(tokenizer):
    rows, _ = asked(tokenizer, counts=[1, 3, 6], seeds=1)
    for first, second, third in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert shown(second)[-1:] == shown(first)
        assert shown(third)[-3:] == shown(second)


def test_what_does_not_fit_goes_from_the_far_end_and_is_counted(tokenizer):
    whole, _ = asked(tokenizer, counts=[6], seeds=1, targets=POOL[:1])
    rows, _ = asked(tokenizer, counts=[6], seeds=1, targets=POOL[:1], budget=200)
    assert 0 < rows[0]["shown"] < 6
    assert rows[0]["dropped"] == 6 - rows[0]["shown"]
    assert shown(rows[0]) == shown(whole[0])[rows[0]["dropped"] :]
    with pytest.raises(UserError, match=r"d:0: the question has .* tokens without any demonstration, expected at most 5"):
        asked(tokenizer, counts=[6], seeds=1, budget=5)


def test_spoiled_demonstrations_keep_their_questions_and_none_are_asked_for_without_any(tokenizer):
    rows, _ = asked(tokenizer, counts=[0, 4], ablations=["none", "flip"], seeds=1, targets=POOL[:1])
    assert [(row["ablation"], row["k"]) for row in rows] == [("none", 0), ("none", 4), ("flip", 4)]
    plain, flipped = (json.loads(row["messages"]) for row in rows[1:])
    assert [turn for turn in plain if turn["role"] == "user"] == [turn for turn in flipped if turn["role"] == "user"]
    other = {"even": "odd", "odd": "even"}
    answers = [[turn["content"] for turn in turns if turn["role"] == "assistant"] for turns in (plain, flipped)]
    assert answers[1] == [other[answer] for answer in answers[0]]
    assert rows[1]["copying"] + rows[2]["copying"] == pytest.approx(1.0)


def test_plain_text_has_no_turns_and_a_system_block_holds_all_demonstrations(tokenizer):
    [row], _ = asked(tokenizer, counts=[2], seeds=1, targets=POOL[:1], layout="text")
    assert row["messages"] is None
    assert row["prompt"].endswith("\n\nitem 0 of the list\n")
    assert row["prompt"].count("\n\n") == 2
    [row], _ = asked(tokenizer, counts=[2], seeds=1, targets=POOL[:1], layout="system", system="Be brief.")
    system, question = json.loads(row["messages"])
    assert system["content"].startswith("Be brief.\n\nitem ")
    assert question == {"role": "user", "content": "item 0 of the list"}
