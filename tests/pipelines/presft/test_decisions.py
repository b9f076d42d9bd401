"""What becomes of a pair follows from its candidates and the four separate choices."""

import pytest

from rayrlhf.batch_inference.scoring import BleuScorer
from rayrlhf.config.pipelines import RelabelSection
from rayrlhf.pipelines.presft.selection import Candidate, agreement, best, decide

GOOD, BETTER = Candidate("good", 1.0, None), Candidate("better", 2.0, None)
CUT_OFF, EMPTY = Candidate("cut", 9.0, "cut off"), Candidate("", 9.0, "empty")


@pytest.mark.parametrize(
    ("settings", "candidates", "action", "reason", "chosen"),
    [
        ({}, [GOOD], "replace", "replace by greedy", 0),
        ({}, [CUT_OFF], "keep", "guarded: cut off", None),
        ({"guarded": "drop"}, [EMPTY], "drop", "guarded: empty", None),
        ({"method": "mbr", "samples": 3}, [GOOD, BETTER, CUT_OFF], "replace", "replace by mbr", 1),
        ({"method": "mbr", "samples": 3}, [CUT_OFF, EMPTY, CUT_OFF], "keep", "guarded: cut off, empty", None),
        ({"struggling": "mix"}, [GOOD], "mix", "mix by greedy", 0),
        ({"struggling": "drop"}, [], "drop", "relabel.struggling is drop", None),
        ({"struggling": "keep"}, [], "keep", "relabel.struggling is keep", None),
        ({}, [Candidate(" original\n", 1.0, None)], "keep", "the new response is the original", 0),
    ],
)
def test_a_decision_follows_from_choices_and_candidates(settings, candidates, action, reason, chosen):
    decision = decide(RelabelSection(**settings), "original", candidates)
    assert (decision.action, decision.chosen) == (action, chosen)
    assert reason in decision.reason
    assert decision.guarded == decision.reason.startswith("guarded")


def test_a_pair_that_needs_candidates_and_has_none_is_a_bug():
    with pytest.raises(ValueError, match="without candidates"):
        decide(RelabelSection(), "original", [])


def test_the_best_is_the_first_of_the_highest_that_are_allowed():
    assert best([1.0, 3.0, 3.0], [True, True, True]) == 1
    assert best([1.0, 3.0, 3.0], [True, False, True]) == 2
    assert best([1.0], [False]) is None
    with pytest.raises(ValueError, match="argument 2 is"):
        best([1.0], [True, True])


def test_agreement_is_the_mean_bleu_to_the_other_candidates():
    scorer = BleuScorer()
    texts = ["3 + 4 = 7 pens. Answer: 7", "3 + 4 = 7 pens. Answer: 7", "3 + 4 = 9 pens. Answer: 9", ""]
    expected = [
        sum(scorer.score(text, other) for place, other in enumerate(texts) if place != index) / 3
        for index, text in enumerate(texts)
    ]
    assert agreement(texts, scorer) == pytest.approx(expected, abs=1e-12)
    assert best(agreement(texts, scorer), [True] * 4) == 0
    assert agreement(["alone"], scorer) == [0.0]
