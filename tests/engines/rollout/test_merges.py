"""Samples with several turns under a tokenizer with merges, where encoding a decoded response gives other tokens.

Letters, digits and angle brackets alone are in its alphabet, so texts pass unharmed and only the tokens differ: no text shows
what breaks here.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import EnvironmentSection, RolloutSection
from rayrlhf.data.records import Prompt, RolloutRequest, SampleKey
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.engines.scoring.frozen import FrozenEngine
from rayrlhf.environments.players.episode_player import EpisodePlayer
from rayrlhf.environments.players.factory import build_player
from tests.environments.sample_players import Scripted

ALPHABET = "<>abcd0123"
PAIRS = [(one, other) for one in ALPHABET for other in ALPHABET]
PAD, END = "<|pad|>", "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each character and for each of their pairs, merged in this order."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = [PAD, END, *ALPHABET, *("".join(pair) for pair in PAIRS)]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=PAIRS))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False, model_max_length=128
    )


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """A random Llama that goes with it; its heads are of 64, as vLLM's kernels want them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("merges")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=128, initializer_range=0.1,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSection.model_validate({"path": str(folder), "dtype": "float32"})


def echo(turns, **keys):
    return EnvironmentSection.model_validate(
        {"name": "tests.environments.sample_players:Echo", "arguments": {"turns": turns}, "max_turn_tokens": 8} | keys
    )


def request(tokenizer, text="ab<0", sample=0):
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
    return RolloutRequest(SampleKey(0, 0, sample), ids, 100 + sample, Prompt(0, text, ids))


def stretches(mask):
    """Start and end of each run of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(mask.astype(np.int8))) + 1).tolist(), len(mask)]
    return list(pairwise(edges))


def test_tokens_that_would_merge_within_a_turn_and_across_its_end_are_left_apart(tokenizer):
    one = tokenizer.convert_tokens_to_ids
    said = [one("a"), one("b"), one("c")]  # an encoder would say "ab", and "c<" with the environment's first character
    scripted = Scripted([said, [one("d"), one("0"), tokenizer.eos_token_id]], tokenizer)
    engine = EpisodePlayer(scripted, echo(2, max_turn_tokens=3), tokenizer)
    engine.submit([request(tokenizer)], temperature=1.0, max_new_tokens=40)
    (rollout,) = engine.poll(1)
    engine.close()
    heard = tokenizer.encode("<abc>", add_special_tokens=False)
    assert rollout.response_ids.tolist() == [*said, *heard, one("d"), one("0"), tokenizer.eos_token_id]
    assert rollout.action_mask.tolist() == [True] * 3 + [False] * len(heard) + [True] * 3
    assert rollout.logprobs.tolist() == [-1, -2, -3] + [0] * len(heard) + [-1, -2, -3]
    assert scripted.asked[1][0].prompt_ids.tolist() == [*request(tokenizer).prompt_ids, *said, *heard]
    again = tokenizer.encode(rollout.text, add_special_tokens=False)
    assert tokenizer.decode(again) == rollout.text == "abc<abc>d0"
    assert len(again) < len(rollout.response_ids) - 1  # so that a mask made for one would lie askew on the other


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def test_the_trainers_logprobs_of_sampled_tokens_are_the_samplers_in_every_turn(backend, model, tokenizer):
    section = RolloutSection.model_validate({"backend": backend, "max_concurrent": 4, "memory_gib": 0.0625})
    engine = build_player(RolloutSpec(model, section, 0, echo(3)))
    engine.submit([request(tokenizer, sample=sample) for sample in range(8)], temperature=1.0, max_new_tokens=100)
    rollouts = []
    while engine.unfinished:
        rollouts += engine.poll(1)
    engine.close()

    scores = FrozenEngine(model, 512).score([rollout.sequence() for rollout in rollouts], frozenset({"logprobs"}))
    merged = 0
    for rollout, score in zip(rollouts, scores, strict=True):
        assert not rollout.failure
        mask, ids = rollout.action_mask, rollout.response_ids.tolist()
        spans = stretches(mask)
        assert mask[0]
        assert len(spans) == 5
        for spoken, heard in zip(spans[:4:2], spans[1::2], strict=True):
            turn = tokenizer.decode(ids[slice(*spoken)], skip_special_tokens=True)
            assert ids[slice(*heard)] == tokenizer.encode(f"<{turn}>", add_special_tokens=False)
        np.testing.assert_allclose(rollout.logprobs[mask], score.logprobs[mask], atol=5e-5)
        again = tokenizer.encode(rollout.text, add_special_tokens=False)
        assert tokenizer.decode(again) == rollout.text
        merged += again != [token for token in ids if token != tokenizer.eos_token_id]
    assert merged == len(rollouts)  # the trap was there in every sample
