"""Scores are sacrebleu's own, to the last bit."""

import pytest
import sacrebleu
from hypothesis import example, given
from hypothesis import strategies as st

from rayrlhf.batch_inference.scoring import BleuScorer, aggregate
from rayrlhf.errors import UserError

SCORERS = {tokenize: BleuScorer(tokenize) for tokenize in ("13a", "intl", "zh", "char", "none")}
LONG = " ".join(f"word{index % 977} and, then {index}!" for index in range(5000))
CASES = [
    ("", ""),
    ("", "something"),
    ("something", ""),
    ("the cat sat on the mat", "the cat sat on the mat"),
    ("4", "4"),
    ("4", "5"),
    ("3 + 4 = 7 pens. Answer: 7", "3 + 4 = 9 pens. Answer: 9"),
    ("猫は座った。", "猫が座った。"),
    ("Größe, naïve café 🙂🙂", "Größe naïve cafe 🙂"),
    ("مرحبا بالعالم", "مرحبا يا عالم"),
    (LONG, LONG[7:]),
    (LONG, LONG),
    (" \t\n", "x"),
]


@pytest.mark.parametrize("tokenize", SCORERS)
@pytest.mark.parametrize(("hypothesis", "reference"), CASES)
def test_a_score_is_that_of_sentence_bleu(tokenize, hypothesis, reference):
    expected = sacrebleu.sentence_bleu(hypothesis, [reference], tokenize=tokenize).score
    assert SCORERS[tokenize].score(hypothesis, reference) == expected


@given(
    st.text(alphabet="ab ,.\n漢1é", max_size=60), st.text(alphabet="ab ,.\n漢1é", max_size=60), st.sampled_from(list(SCORERS))
)
@example("a", "a", "13a")
def test_any_two_texts_score_as_sentence_bleu(hypothesis, reference, tokenize):
    expected = sacrebleu.sentence_bleu(hypothesis, [reference], tokenize=tokenize).score
    assert SCORERS[tokenize].scores([hypothesis], reference) == [expected]


def test_the_signature_names_tokenizer_and_effective_order_before_anything_is_scored():
    signature = BleuScorer("intl").signature
    assert signature.startswith("nrefs:1|case:mixed|eff:yes|tok:intl|smooth:exp|version:")


def test_a_tokenizer_that_cannot_be_downloaded_is_one_line(monkeypatch):
    import sacrebleu.tokenizers.tokenizer_spm as spm

    def refuse(*_):
        raise OSError("no network")

    monkeypatch.setattr(spm, "download_file", refuse)
    monkeypatch.setattr(spm, "SACREBLEU_DIR", "/nonexistent")
    with pytest.raises(UserError, match="BLEU tokenizer flores200: sacrebleu cannot download it"):
        BleuScorer("flores200")


def test_several_probes_become_their_mean_or_their_best():
    assert aggregate([10.0, 30.0], "mean") == 20.0
    assert aggregate([10.0, 30.0], "max") == 30.0
    with pytest.raises(ValueError, match="no scores"):
        aggregate([], "mean")
