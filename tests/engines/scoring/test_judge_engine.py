"""A judge's engine: cache, seeds and refusals with a stand-in, and scores of real engines against plain forward passes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rayrlhf.config.judge import JudgeSection
from rayrlhf.engines.scoring.judge_engine import JudgeEngine, check_judge, check_labels
from rayrlhf.errors import DeviceMemoryError, UserError
from rayrlhf.models.load import load_tokenizer
from rayrlhf.rewards.functions import ScoringBatch
from rayrlhf.rewards.judgments import questions
from tests.engines.rollout_cases import load_network

TINY = "builtin:tiny?layers=2&hidden=128&context=96&tie=true"
BATCH = ScoringBatch(["one", "two", "one"], ["a", "bb", "a"], {})


def section(**settings):
    base = {"model": {"path": TINY, "dtype": "float32"}, "backend": "transformers", "template": "{prompt} {response}?"}
    return JudgeSection.model_validate(base | settings)


class Engine:
    """Gives each label the same probability, or each completion the same text; keeps what it was asked."""

    def __init__(self, probability=0.1, text="Score: 5"):
        self.probability, self.text, self.asked, self.closed = probability, text, [], False

    def next_logprobs(self, prompts, tokens):
        self.asked += [tuple(prompt.tolist()) for prompt in prompts]
        return np.full((len(prompts), len(tokens)), np.log(self.probability), np.float32)

    def submit(self, requests, *, temperature, max_new_tokens):
        self.asked += [(tuple(request.prompt_ids.tolist()), request.seed) for request in requests]
        self.queued = list(requests)

    def poll(self, minimum, seconds=None):
        taken, self.queued = self.queued[:2], self.queued[2:]
        return [SimpleNamespace(key=request.key, text=self.text) for request in taken]


def test_equal_questions_are_asked_once_and_counted():
    engine = Engine()
    judge = JudgeEngine(section(), 0, engine)
    np.testing.assert_allclose(judge.parts(BATCH, [0, 1, 0])["judge_model_cached"], [0, 0, 1])
    assert len(engine.asked) == 2
    parts = judge.parts(BATCH, [0, 1, 0])
    np.testing.assert_allclose(parts["judge_model_cached"], [1, 1, 1])
    np.testing.assert_allclose(parts["judge_model"], [0.5] * 3)
    assert len(engine.asked) == 2


def test_votes_have_seeds_of_their_own_that_depend_on_nothing_else():
    settings = {"score": "text", "votes": 3, "temperature": 1.0, "max_new_tokens": 8}
    one, other = Engine(), Engine()
    np.testing.assert_allclose(JudgeEngine(section(**settings), 0, one).parts(BATCH, [0] * 3)["judge_model"], [0.5] * 3)
    JudgeEngine(section(**settings), 0, other).parts(ScoringBatch(BATCH.prompts[1:], BATCH.responses[1:], {}), [0] * 2)
    assert len(set(one.asked)) == len(one.asked) == 6
    assert set(one.asked) == set(other.asked)
    JudgeEngine(section(**settings), 1, again := Engine()).parts(BATCH, [0] * 3)
    assert {prompt for prompt, _ in again.asked} == {prompt for prompt, _ in one.asked}
    assert not {seed for _, seed in again.asked} & {seed for _, seed in one.asked}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {},
            r"no score for 8 questions to builtin:tiny.*at most 5e-05 together, expected 0.1 \(reward.judge.min_",
        ),
        (
            {"score": "text", "max_new_tokens": 8},
            r"no score in 8 completions of .*reward.judge.verdict.*ends with 'I cannot say'",
        ),
    ],
)
def test_a_judge_that_never_gives_a_score_ends_with_its_reason(settings, message):
    judge = JudgeEngine(section(**settings), 0, Engine(1e-5, "I cannot say"))
    eight = ScoringBatch(["p"] * 8, [str(number) for number in range(8)], {})
    assert np.isnan(judge.parts(BATCH, [0] * 3)["judge_model"]).all()
    with pytest.raises(UserError, match=message):
        judge.parts(eight, [0] * 8)
    with pytest.raises(UserError, match=message.replace("8 ", "2 ")):
        judge.try_out()


def test_one_odd_response_with_many_questions_does_not_end_the_run():
    votes = section(score="text", votes=8, temperature=1.0, max_new_tokens=8)
    assert np.isnan(JudgeEngine(votes, 0, Engine(text="I cannot say")).parts(BATCH, [0] * 3)["judge_model"]).all()
    pairs = JudgeEngine(section(mode="pairwise", template="{first}/{second}"), 0, Engine(1e-5))
    assert np.isnan(pairs.parts(ScoringBatch(["p"] * 4, [*"abcd"], {}), [0] * 4)["judge_model"]).all()


def test_a_question_beyond_the_context_is_counted_and_has_no_score(caplog):
    judge = JudgeEngine(section(), 0, engine := Engine())
    parts = judge.parts(ScoringBatch(["p"] * 2, ["r" * 90, "r"], {}), [0, 1])
    np.testing.assert_allclose(parts["judge_model"], [np.nan, 0.5])
    np.testing.assert_allclose(parts["judge_model_mass"], [np.nan, 0.5])
    assert len(engine.asked) == 1
    assert "1 of 2 questions have no score, because they have more than 95 tokens" in caplog.text
    assert np.isnan(judge.parts(ScoringBatch(["p"] * 9, ["r" * n for n in range(90, 99)], {}), [0] * 9)["judge_model"]).all()
    assert len(engine.asked) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": {"1": 1, "10": 10}}, "reward.judge.labels: '10' is not one token of the tokenizer of builtin:tiny"),
        ({"tensor_parallel_size": 2}, "reward.judge.tensor_parallel_size 2 needs reward.judge.backend 'vllm'"),
        ({"score": "text"}, "reward.judge.max_new_tokens 512 leaves no room for a question: .* a context of 96 tokens"),
        (
            {"template": "t" * 90 + "{response}"},
            r"about short responses has \d+ tokens, expected at most 95 .*reward.judge.templ",
        ),
        ({"max_model_length": 200}, "reward.judge.max_model_length: 200 is beyond the model's 96 positions"),
    ],
)
def test_settings_that_the_model_refuses_are_found_without_loading_it(settings, message):
    with pytest.raises(UserError, match=message):
        check_judge(section(**settings))


def test_a_judge_that_vllm_cannot_serve_is_named_by_its_section(monkeypatch):
    from vllm.v1.engine.llm_engine import LLMEngine

    def refuse(*_):
        raise ValueError("Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired GPU memory utilization.")

    monkeypatch.setattr(LLMEngine, "from_engine_args", refuse)
    with pytest.raises(DeviceMemoryError, match=r"^reward.judge: vLLM cannot serve builtin:tiny.*: Free memory on device"):
        JudgeEngine(section(backend="vllm"), 0)


def test_a_judge_of_pairs_needs_two_labels_alone():
    judge = section(mode="pairwise", template="{first}/{second}")
    assert len(check_labels(judge, load_tokenizer(judge.model))) == 2


def expected_scores(judge, asked, tokenizer):
    """Scores by the definition, from the logits of whole forward passes of transformers."""
    network, tokens = load_network(), check_labels(judge, tokenizer)
    values = []
    for question in asked:
        chat = [{"role": "user", "content": question.text}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            shares = network(torch.tensor([ids])).logits[0, -1].double().softmax(-1)[tokens]
        values.append(float((shares * torch.arange(5)).sum() / shares.sum() / 4))
    return values


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def test_scores_from_logprobs_equal_those_of_plain_forward_passes(backend):
    judge = section(backend=backend, min_mass=0.0, max_concurrent=2, memory_gib=0.0625)
    tokenizer = load_tokenizer(judge.model)
    batch = ScoringBatch(["one", "two or more", "three"], ["a", "bb", "ccc ddd"], {})
    engine = JudgeEngine(judge, 0)
    try:
        engine.try_out()
        parts = engine.parts(batch, [0, 1, 2])
    finally:
        engine.close()
    expected = expected_scores(judge, questions(judge, batch, [0, 1, 2]), tokenizer)
    np.testing.assert_allclose(parts["judge_model"], expected, atol=1e-4)
    assert len(set(np.round(expected, 5))) == 3
    assert (parts["judge_model_mass"] > 0).all()
