"""Both samplers keep the same promises, and agree with a plain forward pass of transformers."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ValidationError, model_validator

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.data.records import RolloutRequest, SampleKey
from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.engines.rollout.common import RolloutSpec, engine_reason, rollout_environment
from rayrlhf.engines.rollout.factory import build_rollout_engine
from rayrlhf.engines.rollout.hf import TransformersRolloutEngine
from rayrlhf.engines.rollout.vllm import VLLMRolloutEngine
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_tokenizer
from rayrlhf.models.tiny import byte_tokenizer
from tests.engines.rollout_cases import CONTEXT, TINY, gap, load_network, make_requests, sample, start
from tests.models.families import write_family

STOPS = ["eee", "nn"]
END = 2
"""Id of the tiny model's end of sequence."""


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def engine(request: pytest.FixtureRequest) -> Iterator[RolloutEngine]:
    engine = start(request.param, stop=STOPS)
    yield engine
    engine.close()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_logprobs_are_those_of_a_forward_pass_at_the_rollout_temperature(engine, temperature):
    rollouts = sample(engine, make_requests(3), temperature=temperature).values()
    assert gap(load_network(), rollouts, temperature=temperature) < 1e-5
    assert gap(load_network(), rollouts, temperature=1.2) > 0.05


def test_greedy_responses_are_those_of_generate(engine):
    network = load_network()
    for rollout in sample(engine, make_requests(1), temperature=0.0).values():
        prompt = torch.from_numpy(rollout.prompt_ids).long()[None]
        expected = network.generate(prompt, do_sample=False, max_new_tokens=24)[0, prompt.shape[1] :].tolist()
        assert rollout.response_ids.tolist() == expected[: len(rollout.response_ids)]
        assert rollout.finish_reason == "stop" or len(rollout.response_ids) == 24
        assert gap(network, [rollout]) < 1e-5


def test_the_same_batch_gives_the_same_bits_again(engine):
    first, other, again = (sample(engine, make_requests(6, step=step)) for step in (0, 1, 0))
    assert other.keys().isdisjoint(first)
    for key, rollout in first.items():
        assert rollout.response_ids.tolist() == again[key].response_ids.tolist()
        assert rollout.logprobs.tobytes() == again[key].logprobs.tobytes()


def test_a_response_depends_on_its_seed_and_not_on_its_neighbours(engine):
    requests = make_requests(4)
    together = sample(engine, requests)
    for alone in (sample(engine, requests[5:6]), sample(engine, requests[::-1])):
        for key, rollout in alone.items():
            assert rollout.response_ids.tolist() == together[key].response_ids.tolist()
            np.testing.assert_allclose(rollout.logprobs, together[key].logprobs, atol=1e-5)
    of_one_prompt = {tuple(rollout.response_ids) for key, rollout in together.items() if key.prompt == 0}
    assert len(of_one_prompt) == 4


def test_sampled_tokens_follow_the_distribution_they_claim(engine):
    """Mean log-prob of a first token is minus the entropy: a wrong temperature or a biased draw shifts it."""
    requests = [RolloutRequest(SampleKey(0, 0, n), np.array([5, 6, 7], dtype=np.int32), seed=n) for n in range(600)]
    rollouts = sample(engine, requests, temperature=0.5, max_new_tokens=1, minimum=600).values()
    with torch.no_grad():
        logprobs = torch.log_softmax(load_network()(torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.5, -1)
    mean = float((logprobs.exp() * logprobs).sum())
    deviation = float((logprobs.exp() * (logprobs - mean) ** 2).sum()) ** 0.5
    sampled = np.mean([rollout.logprobs[0] for rollout in rollouts])
    assert abs(sampled - mean) < 4 * deviation / 600**0.5


def test_a_stop_string_ends_the_response_with_the_token_that_completes_it(engine):
    greedy = sample(engine, make_requests(1), temperature=0.0)[SampleKey(0, 0, 0)]
    assert (greedy.text, greedy.finish_reason) == ("eee", "stop")
    assert len(greedy.response_ids) == len(greedy.logprobs) == 3
    for rollout in sample(engine, make_requests(4), temperature=0.1).values():
        before = load_tokenizer(ModelSection(path=TINY + "true")).decode(rollout.response_ids[:-1])
        assert not any(stop in before for stop in STOPS)
        ended = any(stop in rollout.text for stop in STOPS) or rollout.response_ids[-1] == END
        assert (rollout.finish_reason == "stop") == ended


def test_a_stop_string_of_a_request_ends_that_response_alone(engine):
    first, *others = make_requests(2)
    own = sample(engine, [replace(first, stop=("ee",)), *others], temperature=0.0)
    plain = sample(engine, [first, *others], temperature=0.0)
    assert (own[first.key].text, own[first.key].finish_reason) == ("ee", "stop")
    for other in others:
        assert own[other.key].text == plain[other.key].text


def test_the_end_token_is_part_of_the_response_but_not_of_its_text(engine):
    rollouts = sample(engine, make_requests(25), max_new_tokens=40).values()
    ended = [rollout for rollout in rollouts if rollout.response_ids[-1] == END]
    assert ended
    for rollout in rollouts:
        assert END not in rollout.response_ids[:-1]
        assert "<|im_end|>" not in rollout.text
    assert all(rollout.finish_reason == "stop" for rollout in ended)


def test_a_response_ends_at_max_new_tokens_or_where_the_context_does(engine):
    long = RolloutRequest(SampleKey(0, 9, 0), np.full(CONTEXT - 5, 40, dtype=np.int32), seed=1)
    rollouts = sample(engine, [*make_requests(1), long], max_new_tokens=7)
    assert len(rollouts[SampleKey(0, 9, 0)].response_ids) == 5
    for rollout in rollouts.values():
        assert len(rollout.response_ids) <= 7
        if rollout.finish_reason == "length":
            assert len(rollout.sequence().token_ids) == min(CONTEXT, len(rollout.prompt_ids) + 7)


def test_tokens_that_the_prefix_cache_held_are_counted(engine):
    prompt = np.arange(3, 3 + 70, dtype=np.int32)
    requests = [RolloutRequest(SampleKey(0, 8, sample), prompt, seed=sample) for sample in range(3)]
    counted = [(one.read_tokens, one.cached_tokens) for _, one in sorted(sample(engine, requests, max_new_tokens=3).items())]
    blocks = isinstance(engine, VLLMRolloutEngine)  # of 32 tokens
    assert counted == ([(70, 0), (70, 64), (70, 64)] if blocks else [(0, 0)] * 3)


def test_a_prompt_that_fills_the_context_is_refused_in_one_line_and_nothing_is_queued(engine):
    full = RolloutRequest(SampleKey(0, 17, 0), np.full(CONTEXT, 40, dtype=np.int32), seed=1)
    with pytest.raises(UserError, match=rf"^prompt 17: {CONTEXT} tokens leave no room.*rollout.max_model_length.*$"):
        engine.submit([*make_requests(1), full], temperature=1.0, max_new_tokens=8)
    assert engine.unfinished == 0


def test_a_token_beyond_the_vocabulary_is_refused_in_one_line_and_nothing_is_queued(engine):
    beyond = RolloutRequest(SampleKey(0, 17, 0), np.array([5, 259], dtype=np.int32), seed=1)
    with pytest.raises(
        UserError, match=r"^prompt 17: token 259 of its tokenizer, expected at most 258, the last of the model$"
    ):
        engine.submit([*make_requests(1), beyond], temperature=1.0, max_new_tokens=8)
    assert engine.unfinished == 0


def test_a_request_cannot_be_queued_twice(engine):
    engine.submit(make_requests(1), temperature=1.0, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"request SampleKey\(step=0, prompt=3, sample=0\) is already queued"):
        engine.submit(make_requests(2)[:0:-1], temperature=1.0, max_new_tokens=2)
    assert len(engine.poll(8)) == 4


def test_poll_streams_every_request_exactly_once(engine):
    requests = make_requests(5)
    engine.submit(requests[:9], temperature=1.0, max_new_tokens=12)
    early = engine.poll(2)
    assert 2 <= len(early) <= 9
    engine.submit(requests[9:], temperature=1.0, max_new_tokens=12)
    keys = [rollout.key for rollout in early]
    while engine.unfinished:
        got = engine.poll(4)
        assert len(got) >= 4 or engine.unfinished == 0
        keys += [rollout.key for rollout in got]
        assert len(keys) + engine.unfinished == len(requests)
    assert sorted(keys) == sorted(request.key for request in requests)
    assert engine.poll(1) == []


def test_a_rollout_carries_its_request_and_one_version_a_token(engine):
    requests = {request.key: request for request in make_requests(2)}
    for key, rollout in sample(engine, requests.values()).items():
        assert rollout.prompt_ids.tolist() == requests[key].prompt_ids.tolist()
        assert rollout.seed == requests[key].seed
        assert rollout.versions.tolist() == [engine.version] * len(rollout.response_ids)
        assert rollout.action_mask.all()
        assert len(rollout.action_mask) == len(rollout.logprobs) == len(rollout.response_ids)
        assert (rollout.response_ids.dtype, rollout.logprobs.dtype, rollout.versions.dtype) == (np.int32, np.float32, np.int32)


def test_text_is_decoded_without_special_tokens(engine):
    for rollout in sample(engine, make_requests(4)).values():
        letters = bytes(int(token) - 3 for token in rollout.response_ids if token > 2)
        assert rollout.text.replace("\ufffd", "") == letters.decode(errors="ignore")


@pytest.mark.parametrize("backend", ["transformers", "vllm"])
def test_a_context_beyond_the_models_positions_is_refused(backend):
    section = RolloutSection(backend=backend, max_model_length=CONTEXT + 1)
    with pytest.raises(UserError, match=rf"rollout.max_model_length: {CONTEXT + 1} is beyond the model's {CONTEXT} positions"):
        build_rollout_engine(RolloutSpec(ModelSection(path=TINY + "true", dtype="float32"), section, seed=0))


def test_the_environment_sets_threads_and_keeps_vllm_in_its_process():
    plain = rollout_environment(RolloutSection(backend="transformers"), threads=3)
    assert plain == {"OMP_NUM_THREADS": "3"}
    vllm = rollout_environment(RolloutSection(), threads=2)
    assert vllm["OMP_NUM_THREADS"] == "2"
    assert vllm["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


class Heads(BaseModel):
    """Refuses like a configuration of vLLM."""

    heads: int = 9

    @model_validator(mode="after")
    def check(self) -> "Heads":
        raise ValueError("attention heads (9) must be divisible by tensor parallel size (2)")


def test_the_line_of_an_engines_error_that_holds_the_reason_is_found():
    for arguments, expected in (
        ({}, "Heads: Value error, attention heads (9) must be divisible by tensor parallel size (2)"),
        ({"heads": "x"}, "Heads.heads: Input should be a valid integer, unable to parse string as an integer"),
    ):
        with pytest.raises(ValidationError) as caught:
            Heads(**arguments)
        assert engine_reason(caught.value) == expected
    nested = RuntimeError("Engine core initialization failed. See root cause above.\nValueError: no such architecture\n")
    assert engine_reason(nested) == "no such architecture"
    assert engine_reason(ValueError("\nno room\nfor it")) == "no room"
    assert engine_reason(ValueError()) == "ValueError()"


def test_a_multimodal_model_needs_torchvision_which_is_named_before_the_engine_starts(tmp_path, monkeypatch):
    from transformers import Gemma3Config

    text = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    Gemma3Config(text_config=text, vision_config={"num_hidden_layers": 1, "hidden_size": 32}).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("rayrlhf.engines.rollout.vllm_start.find_spec", lambda name: None)
    spec = RolloutSpec(ModelSection(path=str(tmp_path)), RolloutSection(), seed=0)
    with pytest.raises(UserError, match=r"^rollout: vLLM needs torchvision for gemma3, a multimodal model"):
        VLLMRolloutEngine(spec)
    with pytest.raises(UserError, match=r"^reward\.judge: vLLM needs torchvision for gemma3, a multimodal model"):
        VLLMRolloutEngine(replace(spec, section="reward.judge"))


def test_the_transformers_sampler_reproduces_the_forward_pass_or_is_refused(tmp_path, monkeypatch):
    def engine(name, attention="sdpa"):
        model = ModelSection(path=str(write_family(name, tmp_path / name)), dtype="float32", attention=attention)
        rollout = RolloutSection(backend="transformers", max_model_length=64)
        return TransformersRolloutEngine(RolloutSpec(model, rollout, seed=0))

    assert engine("lfm2")._concurrent == RolloutSection(backend="transformers").max_concurrent
    assert engine("phi3_longrope")._concurrent == 1
    with pytest.raises(UserError, match=r"rollout\.backend transformers: decoding a mamba2? model with its cache"):
        engine("mamba", "eager")
