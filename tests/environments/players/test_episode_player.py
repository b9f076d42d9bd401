"""Samples with several turns: tokens pass untouched, limits and failures follow the documented rules."""

import pickle
import re

import numpy as np
import pytest
import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import EnvironmentSection, RolloutSection
from rayrlhf.data.records import Prompt, Records, RolloutRequest, SampleKey
from rayrlhf.data.seeds import turn_seed
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.environments.environment_loop import EnvironmentLoop
from rayrlhf.environments.players.episode_player import EpisodePlayer
from rayrlhf.environments.players.factory import build_player
from rayrlhf.errors import UserError
from rayrlhf.models.tiny import byte_tokenizer
from tests.engines.rollout_cases import TINY, load_network
from tests.environments.sample_players import Flaky, Scripted

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def request(prompt=0, text="ask", sample=0):
    tokens = np.array(ids(text), np.int32)
    return RolloutRequest(SampleKey(0, prompt, sample), tokens, 7 + prompt, Prompt(prompt, text, tokens))


def section(name="Echo", **keys):
    return EnvironmentSection.model_validate({"name": f"tests.environments.sample_players:{name}"} | keys)


def play(turns, tokens=40, **keys):
    scripted = Scripted(turns, TOKENIZER)
    engine = EpisodePlayer(scripted, section(**keys), TOKENIZER)
    engine.submit([request()], temperature=1.0, max_new_tokens=tokens)
    (rollout,) = engine.poll(1)
    assert engine.unfinished == 0
    engine.close()
    return rollout, scripted


def test_sampled_tokens_and_their_logprobs_arrive_as_they_were_sampled_with_the_environment_masked_between():
    rollout, scripted = play([[*ids("ab"), END], [*ids("c"), END]])
    assert rollout.response_ids.tolist() == [*ids("ab"), END, *ids("<ab>"), *ids("c"), END]
    assert rollout.action_mask.tolist() == [True] * 3 + [False] * 4 + [True] * 2
    assert rollout.logprobs.tolist() == [-1, -2, -3, 0, 0, 0, 0, -1, -2]
    assert rollout.rewards.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert (rollout.versions == 5).all()
    assert rollout.finish_reason == "stop"
    second, limit = scripted.asked[1]
    assert second.prompt_ids.tolist() == [*ids("ask"), *ids("ab"), END, *ids("<ab>")]
    assert limit == 40 - 7
    assert [asked.seed for asked, _ in scripted.asked] == [7, turn_seed(7, 1)]


def test_tokens_that_no_encoder_would_give_survive():
    # Half a character: it decodes to U+FFFD, and encoding that again would give three other tokens.
    broken = [3 + 0xC3, END]
    rollout, scripted = play([broken, [END]])
    assert ids(TOKENIZER.decode(broken[:1])) != broken[:1]
    assert rollout.response_ids[:2].tolist() == broken
    assert scripted.asked[1][0].prompt_ids[3:5].tolist() == broken


def test_the_template_frames_observations_and_special_tokens_in_an_observation_are_only_text():
    template = "\n<|im_start|>tool\n{observation}<|im_end|>\n"
    said = [*ids("<|im_end|>".replace("<", "x")), END]
    rollout, _ = play([said, [END]], template=template)
    assert rollout.response_ids.tolist()[len(said) :].count(TOKENIZER.eos_token_id) == 2  # the template's, and the last turn's
    hostile, _ = play([[*ids("a"), END], [END]], name="Hostile", template=template)
    heard = hostile.response_ids[~hostile.action_mask]
    assert (heard == END).sum() == 1
    assert TOKENIZER.decode(heard.tolist()) == "\n<|im_start|>tool\n<|im_end|><|im_end|>\n"


def test_first_words_stand_before_the_first_turn_and_are_masked():
    rollout, scripted = play([[*ids("a"), END]], arguments={"turns": 1, "first": "go "})
    assert scripted.asked[0][0].prompt_ids.tolist() == ids("askgo ")
    assert rollout.prompt_ids.tolist() == ids("ask")
    assert rollout.action_mask.tolist() == [False] * 3 + [True] * 2


@pytest.mark.parametrize(
    ("tokens", "keys", "turns", "length"),
    [
        (40, {"max_turns": 1}, 1, 3),
        (5, {}, 1, 3),  # The observation does not fit: it is left out.
        (7, {}, 1, 3),  # It fits and leaves no room for a turn: the same.
        (8, {}, 2, 8),  # One token of the second turn, cut by the room and not judged.
        (2, {}, 1, 2),
    ],
)
def test_a_sample_ends_cut_off_where_turns_or_tokens_are_used_up(tokens, keys, turns, length):
    rollout, scripted = play([[*ids("ab"), END], [*ids("cd"), END]], tokens, **keys)
    assert rollout.finish_reason == "length"
    assert (len(scripted.asked), len(rollout.response_ids)) == (turns, length)
    assert rollout.action_mask[-1]
    assert rollout.rewards.sum() == (0 if length == 2 else 1)


def test_a_turn_that_was_cut_is_judged_where_the_response_has_room():
    rollout, scripted = play([ids("abcdef"), ids("ghijkl")], max_turn_tokens=2)
    assert [limit for _, limit in scripted.asked] == [2, 2]
    assert rollout.text == "ab<ab>gh"
    assert rollout.rewards.sum() == 2


@pytest.mark.parametrize(
    ("name", "keys", "reason"),
    [
        ("Raising", {}, "RuntimeError: the tool is broken \\(.*players.py:"),
        ("Sleeping", {"timeout_seconds": 0.1}, "no result within 0.1 s"),
        ("Echo", {"arguments": {"first": "a\ud800b"}}, "lone surrogate at character 2"),
        ("Surrogate", {}, "lone surrogate at character 1"),
        ("RaisingSurrogate", {}, r"RuntimeError: \\ud800 \("),
    ],
)
def test_a_sample_whose_environment_fails_is_played_again_and_then_reported_and_never_rewarded(name, keys, reason):
    rollout, scripted = play([[*ids("ab"), END]] * 2, name=name, **keys)
    assert rollout.rewards is None
    assert rollout.failure
    assert re.search(reason, rollout.failure)
    assert len(rollout.response_ids) == 0
    rollout.failure.encode()
    if "first" not in keys.get("arguments", {}):
        assert len(scripted.asked) == 2
        assert scripted.asked[0][0].seed == scripted.asked[1][0].seed


def test_a_sample_that_failed_once_is_whole_after_it_was_played_again():
    Flaky.made = 0
    rollout, _ = play([[*ids("ab"), END]] * 3, name="Flaky")
    assert not rollout.failure
    assert rollout.rewards.sum() == 2


def test_an_environment_that_blocks_instead_of_awaiting_is_found_out(monkeypatch):
    monkeypatch.setattr(
        "rayrlhf.environments.players.episode_player.EnvironmentLoop", lambda seconds: EnvironmentLoop(seconds, grace=0.1)
    )
    rollout, _ = play([[END]], name="Blocking", timeout_seconds=0.1, retries=0)
    assert "blocks" in rollout.failure


def test_a_reward_that_is_no_number_stops_the_run():
    with pytest.raises(UserError, match=r"Careless' returned reward nan, expected a finite number"):
        play([[END]], name="Careless")


def test_records_of_played_and_failed_samples_travel_as_columns():

    played, _ = play([[*ids("ab"), END], [*ids("c"), END]])
    failed, _ = play([[END]], name="Raising", retries=0)
    first, second = pickle.loads(pickle.dumps(Records([played, failed])))
    assert first.rewards.tolist() == played.rewards.tolist()
    assert second.failure == failed.failure


def start(environment, **keys):
    rollout = RolloutSection.model_validate({"backend": "transformers", "max_concurrent": 4})
    return build_player(RolloutSpec(ModelSection(path=TINY + "true", dtype="float32"), rollout, 0, environment, **keys))


def sample(engine, requests, tokens):
    engine.submit(requests, temperature=1.0, max_new_tokens=tokens)
    rollouts = []
    while engine.unfinished:
        rollouts += engine.poll(1)
    engine.close()
    return sorted(rollouts, key=lambda rollout: rollout.key)


def test_a_sample_of_one_turn_is_bit_for_bit_the_sample_without_an_environment():
    requests = [request(prompt, "one two") for prompt in range(4)]
    plain = sample(start(None), requests, 12)
    played = sample(start(section(arguments={"turns": 1}), lockstep=True), requests, 12)
    for one, other in zip(plain, played, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert one.logprobs.tolist() == other.logprobs.tolist()
        assert one.text == other.text


def test_logprobs_over_turns_are_those_of_the_model_reading_the_whole_transcript():

    requests = [request(prompt, "How many") for prompt in range(4)]
    rollouts = sample(start(section(arguments={"turns": 3}, max_turn_tokens=6)), requests, 60)
    network = load_network()
    for rollout in rollouts:
        tokens = torch.from_numpy(rollout.sequence().token_ids).long()[None]
        with torch.no_grad():
            logprobs = network(tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
        own = logprobs[len(rollout.prompt_ids) - 1 :].numpy()
        mask = rollout.action_mask
        assert 0 < mask.sum() < len(mask)
        np.testing.assert_allclose(rollout.logprobs[mask], own[mask], atol=2e-5)


def test_in_lockstep_the_order_of_answers_changes_no_bit():
    requests = [request(prompt, "one two") for prompt in range(4)]
    limits = {"arguments": {"turns": 3}, "max_turn_tokens": 5}
    quick = sample(start(section("Echo", **limits), lockstep=True), requests, 60)
    late = sample(start(section("Delayed", **limits), lockstep=True), requests, 60)
    assert [one.response_ids.tolist() for one in quick] == [one.response_ids.tolist() for one in late]
    assert [one.logprobs.tolist() for one in quick] == [one.logprobs.tolist() for one in late]


def test_a_full_context_ends_the_sample_as_cut_off():
    (rollout,) = sample(start(section(arguments={"turns": 50}, max_turns=50, max_turn_tokens=8)), [request()], 500)
    assert rollout.finish_reason == "length"
    assert len(rollout.sequence().token_ids) <= 96
    assert rollout.action_mask[-1]


def test_a_cancellation_counts_the_tokens_of_all_turns():
    scripted = Scripted([[*ids("ab"), END]], TOKENIZER)
    engine = EpisodePlayer(scripted, section("Sleeping"), TOKENIZER)
    engine.submit([request()], temperature=1.0, max_new_tokens=40)
    while not scripted.asked:
        assert engine.poll(1, 0.1) == []
    scripted.queued = [None, None]
    assert engine.cancel() == 3 + 2 * 10
    assert engine.cancel() == 0
    engine.close()


def test_what_was_cancelled_leaves_nothing_and_is_played_the_same_when_asked_for_again():
    requests = [request(prompt, "one two") for prompt in range(3)]  # each waits for its environment twice
    engine = start(section("Delayed", arguments={"turns": 3}, max_turn_tokens=5), continues=True)
    engine.submit(requests, temperature=1.0, max_new_tokens=60)
    assert engine.poll(4, 0.02) == []  # within its time, whoever is waited for
    assert engine.unfinished == 3
    engine.cancel()
    assert engine.unfinished == 0
    assert engine.poll(1) == []
    again = sample(engine, requests, 60)
    fresh = sample(start(section("Delayed", arguments={"turns": 3}, max_turn_tokens=5)), requests, 60)
    assert [one.response_ids.tolist() for one in again] == [one.response_ids.tolist() for one in fresh]
    assert not any(one.failure for one in again)
