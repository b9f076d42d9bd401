"""Contract test of rollout engines, on the built-in tiny model."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.data.records import Rollout, RolloutRequest, SampleKey
from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.engines.rollout.common import START_VERSION, RolloutSpec
from rayrlhf.engines.rollout.factory import build_rollout_engine
from rayrlhf.errors import UserError
from rayrlhf.library_types import PreTrainedModel
from rayrlhf.models.load import load_causal_model
from rayrlhf.testing.expect import expect

MODEL = ModelSection(path="builtin:tiny?layers=1&hidden=64&context=64", dtype="float32")
NEW_TOKENS = 8
TOLERANCE = 1e-3
"""Maximum |engine log-prob - log-prob of a plain forward pass|, in nats, in float32."""
POLLS = 1000
FIELDS = {"response_ids": "int32", "logprobs": "float32", "versions": "int32", "action_mask": "bool"}


def check_rollout_engine(backend: str, **arguments: Any) -> None:
    """Run a rollout engine through submit, poll, cancel and a weight update.

    Every request must finish once, within its limit, with float32 log-probs equal to those of a plain forward pass. The same
    seed must give the same response. New weights must be in use, under their version, after `finish_weights`.

    Args:
        backend: `rollout.backend` of the config, for example `my_engines.py:Engine`.
        arguments: `rollout.arguments` of the config.

    Raises:
        AssertionError: the engine breaks its contract.
    """
    section = RolloutSection(backend=backend, arguments=arguments, max_concurrent=4, memory_gib=0.0625)
    try:
        engine = build_rollout_engine(RolloutSpec(MODEL, section, seed=0))
    except UserError as error:
        raise AssertionError(str(error)) from error
    network: PreTrainedModel = load_causal_model(MODEL).eval()
    try:
        expect(engine.version == START_VERSION, f"version {engine.version} at the start, expected {START_VERSION}")
        first = _sample(engine, _requests())
        _check_rollouts(engine, network, first)
        again = _sample(engine, _requests())
        for key, rollout in first.items():
            same = np.array_equal(rollout.response_ids, again[key].response_ids)
            expect(same, f"request {key} sampled other tokens when repeated with the same seed")
        _check_queue(engine)
        _check_weights(engine, network)
    finally:
        engine.close()


def _requests() -> list[RolloutRequest]:
    prompts = [np.arange(5, 5 + length, dtype=np.int32) for length in (3, 9, 6)]
    return [
        RolloutRequest(SampleKey(0, prompt, sample), ids, seed=10 * prompt + sample)
        for prompt, ids in enumerate(prompts)
        for sample in range(2)
    ]


def _sample(engine: RolloutEngine, requests: list[RolloutRequest]) -> dict[SampleKey, Rollout]:
    engine.submit(requests, temperature=1.0, max_new_tokens=NEW_TOKENS)
    rollouts: list[Rollout] = []
    for _ in range(POLLS):
        if not engine.unfinished:
            break
        rollouts += engine.poll(1)
    expect(not engine.unfinished, f"{engine.unfinished} requests are unfinished after {POLLS} polls")
    keys = [rollout.key for rollout in rollouts]
    expect(sorted(keys) == sorted(request.key for request in requests), f"requests {keys} finished, expected each request once")
    return {rollout.key: rollout for rollout in rollouts}


def _check_rollouts(engine: RolloutEngine, network: PreTrainedModel, rollouts: dict[SampleKey, Rollout]) -> None:
    for request in _requests():
        rollout = rollouts[request.key]
        name, count = f"rollout {request.key}", len(rollout.response_ids)
        expect(np.array_equal(rollout.prompt_ids, request.prompt_ids), f"{name} has another prompt than its request")
        expect(1 <= count <= NEW_TOKENS, f"{name} has {count} tokens, expected 1 to {NEW_TOKENS}")
        for field, dtype in FIELDS.items():
            array = getattr(rollout, field)
            found = f"{array.dtype} {array.shape}"
            expect(array.dtype == dtype and array.shape == (count,), f"{name}: {field} is {found}, expected {dtype} ({count},)")
        expect(rollout.action_mask.all(), f"{name}: the policy sampled every token, expected action_mask True")
        expect((rollout.versions == engine.version).all(), f"{name}: versions {rollout.versions}, expected {engine.version}")
        expect(rollout.finish_reason in ("stop", "length"), f"{name}: finish_reason {rollout.finish_reason!r}")
    difference = _logprob_difference(network, rollouts.values())
    expect(difference < TOLERANCE, f"log-probs differ from a forward pass by {difference:.2g} nats, expected < {TOLERANCE:g}")


def _check_queue(engine: RolloutEngine) -> None:
    requests = _requests()
    engine.submit(requests, temperature=1.0, max_new_tokens=NEW_TOKENS)
    expect(engine.unfinished == len(requests), f"{engine.unfinished} unfinished after {len(requests)} were submitted")
    with _raises(ValueError, "a request that is already queued"):
        engine.submit(requests[:1], temperature=1.0, max_new_tokens=NEW_TOKENS)
    with _raises(RuntimeError, "new weights while requests are unfinished"):
        engine.begin_weights(engine.version + 1)
    tokens = engine.cancel()
    expect(not engine.unfinished, f"{engine.unfinished} unfinished after cancel, expected 0")
    expect(tokens == 0, f"cancel returned {tokens!r}, expected the number of sampled tokens, 0 before a poll")


@torch.no_grad()
def _check_weights(engine: RolloutEngine, network: PreTrainedModel) -> None:
    engine.sleep()
    for parameter in network.parameters():
        parameter.mul_(1.5)
    engine.begin_weights(3)
    for name, tensor in network.state_dict().items():
        engine.receive_weights([(name, tensor.contiguous())])
    engine.finish_weights()
    expect(engine.version == 3, f"version {engine.version} after finish_weights, expected 3")
    _check_rollouts(engine, network, _sample(engine, _requests()))


@contextmanager
def _raises(kind: type[Exception], what: str) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise AssertionError(f"{what} was accepted, expected {kind.__name__}")


@torch.no_grad()
def _logprob_difference(network: PreTrainedModel, rollouts: Iterable[Rollout]) -> float:
    largest = 0.0
    for rollout in rollouts:
        tokens = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.response_ids])).long()
        logits = network(input_ids=tokens[None]).logits[0, len(rollout.prompt_ids) - 1 : -1].float()
        logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[len(rollout.prompt_ids) :, None])[:, 0]
        largest = max(largest, float((logprobs - torch.from_numpy(rollout.logprobs)).abs().max()))
    return largest
