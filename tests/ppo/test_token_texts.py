"""The tokens of written-down responses and their part of the KL."""

import numpy as np
import torch

from rayrlhf.algorithms.kl import kl_penalty
from rayrlhf.config.model import ModelSection
from rayrlhf.data.records import Rollout, SampleKey, TokenScores
from rayrlhf.ppo.run_recorder import SampleTokens, token_kl
from rayrlhf.ppo.scoring import ScoredRollouts
from rayrlhf.rewards.score import RewardBatch

RANDOM = np.random.default_rng(3)


def logprobs(count: int = 5) -> np.ndarray:
    return RANDOM.normal(-2, 1, count).astype(np.float32)


def scored(mask: list[bool], **forward_passes: np.ndarray | None) -> ScoredRollouts:
    size = len(mask)
    rollout = Rollout(
        key=SampleKey(1, 0, 0),
        prompt_ids=np.array([1, 2], np.int32),
        response_ids=np.arange(size, dtype=np.int32),
        action_mask=np.array(mask),
        logprobs=np.full(size, -1.0, np.float32),
        versions=np.ones(size, np.int32),
        finish_reason="stop",
        text="text",
        seed=0,
    )
    rewards = RewardBatch(scores=torch.zeros(1), parts={})
    return ScoredRollouts(
        (rollout,), rewards, {name: [TokenScores(logprobs=read)] for name, read in forward_passes.items()}, {}
    )


def test_each_tokens_part_is_the_k1_estimate_and_tokens_of_others_have_none():
    policy, reference, mask = logprobs(), logprobs(), [True, True, False, True, True]
    found = token_kl(scored(mask, policy=policy, reference=reference), 0)
    expected = kl_penalty(torch.tensor(policy)[None], torch.tensor(reference)[None], "k1")[0].numpy() * np.array(mask)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_samplers_own_log_probs_stand_in_for_a_policy_that_did_not_read_again():
    reference = logprobs()
    np.testing.assert_allclose(token_kl(scored([True] * 5, reference=reference), 0), -1.0 - reference, rtol=1e-6)
    np.testing.assert_allclose(token_kl(scored([True] * 5, policy=None, reference=reference), 0), -1.0 - reference, rtol=1e-6)


def test_there_is_none_without_a_reference():
    assert token_kl(scored([True] * 5, policy=logprobs()), 0) is None
    assert token_kl(scored([True] * 5, policy=logprobs(), reference=None), 0) is None


def test_tokens_together_are_the_text():
    tokens = SampleTokens(ModelSection(path="builtin:tiny"))
    ids = tokens.tokenizer("12+30=42", add_special_tokens=False)["input_ids"]
    assert "".join(tokens.texts(ids)) == "12+30=42"
