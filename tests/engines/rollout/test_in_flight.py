"""New weights reach samplers in the middle of responses: every token is what the weights of its version say of it."""

import time

import numpy as np
import pytest
import torch

from tests.engines.rollout_cases import make_requests, sample, start
from tests.weight_sync.test_buckets import buckets_of, load, perturbed


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def engine(request):
    started = start(request.param, continues=True)
    yield started
    started.close()


@torch.no_grad()
def gap_by_version(networks, rollouts):
    """Largest |sampler log-prob - log-prob by the weights of the token's version| in nats."""
    gaps = []
    for rollout in rollouts:
        tokens = torch.from_numpy(rollout.sequence().token_ids).long()
        first = len(rollout.prompt_ids)
        by_version = {
            version: torch.log_softmax(network(input_ids=tokens[None]).logits[0, first - 1 : -1].float(), -1)
            for version, network in networks.items()
        }
        for index, version in enumerate(rollout.versions):
            expected = by_version[int(version)][index, tokens[first + index]]
            gaps.append(abs(float(expected) - float(rollout.logprobs[index])))
    return max(gaps)


def decode_a_little(engine):
    """Some tokens of every running request, but not all: a poll without time decodes nothing, so give it a moment."""
    finished = []
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        finished += engine.poll(10**6, 0.005)
    return finished


def test_unfinished_responses_go_on_with_the_new_weights_and_say_so_token_by_token(engine):
    networks = {1: perturbed(tie=True, seed=1), 2: perturbed(tie=True, seed=2)}
    load(engine, 1, buckets_of(networks[1], 300_000))
    engine.submit(make_requests(5), temperature=1.0, max_new_tokens=60)
    rollouts = decode_a_little(engine)
    assert engine.unfinished
    load(engine, 2, buckets_of(networks[2], 300_000))
    while engine.unfinished:
        rollouts += engine.poll(4)
    assert sorted(rollout.key for rollout in rollouts) == sorted(request.key for request in make_requests(5))
    mixed = [rollout for rollout in rollouts if len(set(rollout.versions.tolist())) == 2]
    assert mixed
    assert all((np.diff(rollout.versions) >= 0).all() for rollout in rollouts)
    assert gap_by_version(networks, rollouts) < 5e-5
    swapped = {1: networks[2], 2: networks[1]}
    assert gap_by_version(swapped, mixed) > 0.1


def test_a_poll_returns_within_its_time_and_the_next_one_goes_on(engine):
    engine.submit(make_requests(5), temperature=1.0, max_new_tokens=60)
    assert engine.poll(20, 0.0) == []
    assert engine.unfinished == 20
    assert len(engine.poll(20)) == 20


def test_a_cancellation_counts_the_tokens_that_were_sampled_in_vain(engine):
    engine.submit(make_requests(2), temperature=1.0, max_new_tokens=60)  # as many as are decoded at a time
    finished = engine.poll(1)
    others = engine.unfinished
    assert others
    # Each step gives every request a token.
    assert engine.cancel() == others * len(finished[0].response_ids)
    assert engine.cancel() == 0


def test_what_was_cancelled_is_gone_and_sampled_the_same_when_asked_for_again(engine):
    requests = make_requests(3)
    whole = sample(engine, requests, max_new_tokens=40, minimum=12)
    engine.submit(requests, temperature=1.0, max_new_tokens=40)
    decode_a_little(engine)
    engine.cancel()
    assert engine.unfinished == 0
    assert engine.poll(1) == []
    again = sample(engine, requests, max_new_tokens=40, minimum=12)
    for key, rollout in whole.items():
        assert again[key].response_ids.tolist() == rollout.response_ids.tolist()
