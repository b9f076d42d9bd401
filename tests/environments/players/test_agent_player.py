"""Samples played by agents over HTTP: tokens pass untouched, limits, failures and stretches follow the documented rules."""

import asyncio
import os
import re
import sys
import threading
import time

import httpx
import numpy as np
import pytest
import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import EnvironmentSection, RolloutSection
from rayrlhf.data.records import SEGMENT_STRIDE, Prompt, Records, RolloutRequest, SampleKey
from rayrlhf.data.seeds import turn_seed
from rayrlhf.data.templates import render
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.environments.players.agent_player import AgentPlayer
from rayrlhf.environments.players.agent_session import Texts
from rayrlhf.environments.players.factory import build_player
from rayrlhf.environments.registry import environment_maker, find_agent
from rayrlhf.errors import UserError
from rayrlhf.models.tiny import byte_tokenizer
from tests.engines.rollout_cases import TINY, load_network
from tests.environments import agents
from tests.environments.sample_players import Scripted

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
PROGRAM = """
import json, os, sys, urllib.request
task = json.loads(sys.stdin.readline())
body = {"model": os.environ["OPENAI_MODEL"], "messages": [{"role": "user", "content": task["prompt"]}]}
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode(),
    {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"})
said = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
print("thinking")
print(float(said == task["columns"]["answer"]))
"""


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def opened(*messages):
    return ids(render(TOKENIZER, [[{"role": role, "content": text} for role, text in messages]], ["here"])[0])


def request(prompt=0, sample=0, answer="ab"):
    tokens = np.array(ids("unused"), np.int32)
    return RolloutRequest(SampleKey(0, prompt, sample), tokens, 7 + prompt, Prompt(prompt, "ask", tokens, {"answer": answer}))


def section(agent, **keys):
    known = {"name": f"tests.environments.agents:{agent}", "retries": 0, "timeout_seconds": 20.0}
    return EnvironmentSection.model_validate(known | keys)


TEXTS = Texts.of(TOKENIZER)


def engine_of(turns, agent, *, lockstep=False, **keys):
    scripted, limits = Scripted(turns, TOKENIZER), section(agent, **keys)
    return AgentPlayer(scripted, find_agent(limits), limits, TEXTS, lockstep=lockstep), scripted


def play(turns, agent, tokens=200, **keys):
    engine, scripted = engine_of(turns, agent, **keys)
    try:
        engine.submit([request()], temperature=1.0, max_new_tokens=tokens)
        (rollout,) = engine.poll(1)
        assert engine.unfinished == 0
    finally:
        engine.close()
    return rollout, scripted


def test_sampled_tokens_arrive_as_they_were_sampled_and_what_the_agent_says_between_is_masked():
    rollout, scripted = play([[*ids("ab"), END], [*ids("c"), END]], "turns")
    first = opened(("user", "ask"))
    between = opened(("user", "ask"), ("assistant", "ab"), ("user", "go on"))[len(first) + 3 :]
    assert rollout.prompt_ids.tolist() == first
    assert rollout.response_ids.tolist() == [*ids("ab"), END, *between, *ids("c"), END]
    assert rollout.action_mask.tolist() == [True] * 3 + [False] * len(between) + [True] * 2
    assert rollout.logprobs[rollout.action_mask].tolist() == [-1, -2, -3, -1, -2]
    assert not rollout.logprobs[~rollout.action_mask].any()
    assert rollout.rewards.tolist() == [0.0] * (len(rollout.rewards) - 1) + [2.0]
    assert (rollout.finish_reason, rollout.key, rollout.extra_segments, rollout.failure) == ("stop", request().key, (), "")
    (one, _), (two, limit) = scripted.asked
    assert one.prompt_ids.tolist() == first
    assert two.prompt_ids.tolist() == [*first, *ids("ab"), END, *between]
    # Nothing was encoded anew, and all of it is what the template says of the whole conversation.
    assert two.prompt_ids.tolist() == opened(("user", "ask"), ("assistant", "ab"), ("user", "go on"))
    assert limit == 200 - 3 - len(between)
    assert [one.seed, two.seed] == [7, turn_seed(7, 1)]


def test_tokens_that_no_encoder_would_give_survive():
    broken = [3 + 0xC3, END]  # Half a character, which decodes to U+FFFD.
    rollout, scripted = play([broken, [END]], "turns")
    first = opened(("user", "ask"))
    assert rollout.response_ids[:2].tolist() == broken
    assert scripted.asked[1][0].prompt_ids[len(first) :][:2].tolist() == broken
    assert rollout.extra_segments == ()


def test_an_answer_that_was_cut_is_closed_by_the_template_and_one_that_came_back_stripped_still_goes_on():
    rollout, scripted = play([ids(" ab "), [*ids("c"), END]], "stripping", max_turn_tokens=4)
    assert rollout.extra_segments == ()
    first = opened(("user", "ask"))
    text = TOKENIZER.decode(scripted.asked[1][0].prompt_ids[len(first) :].tolist())
    assert text.startswith(" ab <|im_end|>\n<|im_start|>user\ngo on<|im_end|>\n")
    assert [limit for _, limit in scripted.asked] == [4, 4]


def test_a_request_that_goes_on_from_nothing_begins_a_segment_with_the_same_reward():
    rollout, _ = play([[*ids("a"), END], [*ids("b"), END], [*ids("c"), END]], "forgetful")
    (other,) = rollout.extra_segments
    assert rollout.response_ids[rollout.action_mask].tolist() == [*ids("a"), END, *ids("b"), END]
    assert other.response_ids.tolist() == [*ids("c"), END]
    assert other.prompt_ids.tolist() == opened(("system", "Sum up."), ("user", "all of it"))
    assert other.key == SampleKey(0, 0, SEGMENT_STRIDE)
    assert [float(part.rewards.sum()) for part in (rollout, other)] == [0.5, 0.5]
    (travelled,) = Records([rollout]).__reduce__()[0](*Records([rollout]).__reduce__()[1])
    assert travelled.extra_segments[0].response_ids.tolist() == other.response_ids.tolist()


@pytest.mark.parametrize(
    ("name", "tokens", "keys", "reward"),
    [("stubborn", 200, {"max_turns": 2}, 0.0), ("content", 200, {"max_turns": 2}, 0.25), ("content", 28, {}, 0.25)],
)
def test_an_agent_that_has_no_room_left_is_told_so_and_its_sample_counts_as_cut_off(name, tokens, keys, reward):
    rollout, scripted = play([[*ids("ab"), END]] * 2, name, tokens, **keys)
    assert (rollout.finish_reason, rollout.failure) == ("length", "")
    assert rollout.rewards.sum() == reward
    assert len(scripted.asked) == keys.get("max_turns", 1)


@pytest.mark.parametrize(
    ("name", "keys", "reason"),
    [
        ("raising", {}, r"RuntimeError: the browser crashed \(.*agents.py:"),
        ("leaving", {}, r"the agent ended by SystemExit\(3\)"),
        ("sleeping", {"timeout_seconds": 0.2}, "no request and no end within 0.2 s"),
        ("blocking", {"timeout_seconds": 0.2}, "no request and no end within 0.2 s"),
        ("silent", {}, "requested no completion"),
        ("garbled", {}, "400 Bad Request"),
    ],
)
def test_an_agent_that_fails_is_told_and_is_no_reward(name, keys, reason):
    rollout, _ = play([], name, **keys)
    assert len(rollout.response_ids) == 0
    assert re.search(reason, rollout.failure)


def test_a_sample_that_failed_is_played_again_with_the_same_seeds():
    agents.STARTED.clear()
    rollout, scripted = play([[*ids("a"), END]] * 2, "flaky", retries=1)
    assert agents.STARTED == [0, 0]
    assert rollout.failure == ""
    assert len({asked.seed for asked, _ in scripted.asked}) == 1


def test_an_agent_that_blocks_the_others_is_left_behind():
    agents.STARTED.clear()
    rollout, _ = play([[*ids("a"), END]] * 2, "hogging", retries=1, timeout_seconds=0.3)
    assert agents.STARTED == [0, 0]
    assert rollout.rewards.sum() == 1.0


@pytest.mark.parametrize(
    ("name", "message"), [("careless", "returned nan, expected a finite number"), ("mistaken", "no such column")]
)
def test_a_mistake_of_the_run_is_no_failure_of_a_sample(name, message):
    with pytest.raises(UserError, match=message):
        play([[*ids("a"), END]], name)


def delayed_rollout(engine, scripted, delay, *, asked):
    """The rollout of one request, whose completion comes late once the sampler was asked `asked` times."""
    decode = scripted.poll

    def poll(minimum, seconds=None):
        time.sleep(delay if len(scripted.asked) == asked else 0)
        return decode(minimum, seconds)

    scripted.poll = poll
    engine.submit([request()], temperature=1.0, max_new_tokens=50)
    (rollout,) = engine.poll(1)
    engine.close()
    return rollout


def test_an_answer_that_no_one_waited_for_is_not_learned_from():
    engine, scripted = engine_of([[*ids("a"), END], [*ids("b"), END]], "impatient")
    rollout = delayed_rollout(engine, scripted, 0.5, asked=2)
    assert len(scripted.asked) == 2
    assert rollout.response_ids.tolist() == [*ids("a"), END]
    assert rollout.extra_segments == ()


def test_a_completion_whose_client_is_gone_is_left_out():
    engine, scripted = engine_of([[*ids("a"), END], [*ids("b"), END]], "giving_up")
    rollout = delayed_rollout(engine, scripted, 1.0, asked=1)
    assert len(scripted.asked) == 2
    assert rollout.response_ids.tolist() == [*ids("b"), END]
    assert rollout.extra_segments == ()


def test_in_lockstep_every_batch_has_a_turn_of_every_agent_in_the_order_of_the_samples():
    engine, scripted = engine_of([[*ids("a"), END]] * 6, "waiting", lockstep=True)
    batches, plain = [], scripted.poll

    def poll(minimum, seconds=None):
        batches.append([asked.key.prompt for asked, _ in scripted.queued])
        return plain(minimum, seconds)

    scripted.poll = poll
    engine.submit([request(prompt) for prompt in range(3)], temperature=1.0, max_new_tokens=50)
    assert len(engine.poll(3)) == 3
    engine.close()
    assert batches == [[0, 1, 2], [0, 1, 2]]


def test_a_cancellation_counts_the_tokens_of_all_completions():
    engine, scripted = engine_of([[*ids("ab"), END]], "resting")
    engine.submit([request()], temperature=1.0, max_new_tokens=100)
    while not scripted.asked:
        assert engine.poll(1, 0.1) == []
    scripted.queued = [None, None]
    assert engine.cancel() == 3 + 2 * 10
    assert engine.cancel() == 0
    engine.close()


def test_cancelling_gives_the_agents_up_and_the_same_samples_can_be_asked_for_again():
    engine, _ = engine_of([[*ids("a"), END]] * 2, "turns")
    engine.submit([request()], temperature=1.0, max_new_tokens=100)
    with pytest.raises(ValueError, match="already queued"):
        engine.submit([request()], temperature=1.0, max_new_tokens=100)
    engine.cancel()
    assert engine.unfinished == 0
    assert engine.poll(1, 0.3) == []
    engine.submit([request()], temperature=1.0, max_new_tokens=100)
    (rollout,) = engine.poll(1)
    engine.close()
    assert rollout.rewards.sum() == 2.0


def test_a_program_is_an_agent_and_its_last_line_the_reward():
    command = {"command": [sys.executable, "-c", PROGRAM]}
    rollout, _ = play([[*ids("ab"), END]], "unused", name="program", arguments=command)
    assert rollout.failure == ""
    assert (rollout.rewards.sum(), rollout.text) == (1.0, "ab")
    failed, _ = play([], "unused", name="program", arguments={"command": [sys.executable, "-c", "print('no number')"]})
    assert "printed 'no number' as its last line, expected the reward" in failed.failure
    ended, _ = play(
        [], "unused", name="program", arguments={"command": [sys.executable, "-c", "import sys; sys.exit('bad day')"]}
    )
    assert "exit code 1: bad day" in ended.failure


def test_a_program_that_is_given_up_is_gone_with_all_that_it_started(tmp_path):
    noted = tmp_path / "pids"
    script = f"sleep 60 & echo $! $$ > {noted}; wait"
    rollout, _ = play([], "unused", name="program", arguments={"command": ["sh", "-c", script]}, timeout_seconds=0.5)
    assert "no request and no end" in rollout.failure
    for pid in map(int, noted.read_text().split()):
        deadline = time.monotonic() + 5
        while is_there(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_there(pid)


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as status:  # noqa: PTH123 - a zombie is gone for all purposes
        return status.read().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture(scope="module")
def open_session():
    """An engine whose only agent waits, and the address and token of its session."""
    engine, _ = engine_of([], "sleeping")
    engine.submit([request()], temperature=1.0, max_new_tokens=50)
    (token,) = engine._sessions
    yield engine._server.url, token
    engine.close()


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
GOOD = {"model": "policy", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("path", "fields", "key", "status", "code"),
    [
        ("chat/completions", {}, "another", 401, "invalid_api_key"),
        ("completions", {}, None, 404, "not_found"),
        ("chat/completions", {"n": 65}, None, 400, "invalid_n"),
        ("chat/completions", {"tools": [{"type": "function"}]}, None, 400, "invalid_tools"),
        ("chat/completions", {"tools": TOOLS + TOOLS}, None, 400, "invalid_tools"),
        ("chat/completions", {"tool_choice": "required"}, None, 400, "invalid_tool_choice"),
        ("chat/completions", {"tools": TOOLS, "tool_choice": {"type": "function"}}, None, 400, "invalid_tool_choice"),
        ("chat/completions", {"functions": [{"name": "add"}]}, None, 400, "invalid_functions"),
        ("chat/completions", {"logit_bias": {"1": 5}}, None, 400, "invalid_logit_bias"),
        ("chat/completions", {"top_logprobs": 2}, None, 400, "invalid_top_logprobs"),
        ("chat/completions", {"stop": ["a"] * 17}, None, 400, "invalid_stop"),
        ("chat/completions", {"stop": [""]}, None, 400, "invalid_stop"),
        ("chat/completions", {"stream": "yes"}, None, 400, "invalid_stream"),
        ("chat/completions", {"stream_options": 1}, None, 400, "invalid_stream_options"),
        ("chat/completions", {"seed": "x"}, None, 400, "invalid_seed"),
        ("chat/completions", {"messages": "hi"}, None, 400, "invalid_messages"),
        ("chat/completions", {"messages": [3]}, None, 400, "invalid_messages"),
        ("chat/completions", {"chat_template_kwargs": {"tools": 1}}, None, 400, "invalid_chat_template_kwargs"),
        ("chat/completions", {"response_format": {"type": "xml"}}, None, 400, "invalid_response_format"),
        ("chat/completions", {"max_tokens": 0.5}, None, 400, "invalid_max_tokens"),
        ("chat/completions", {"messages": []}, None, 400, "invalid_messages"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, None, 400, "invalid_messages"),
        ("chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, None, 400, "invalid_messages"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            None,
            400,
            "invalid_messages",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(open_session, path, fields, key, status, code):
    url, token = open_session
    response = httpx.post(f"{url}/{path}", json=GOOD | fields, headers={"Authorization": f"Bearer {key or token}"})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


def test_a_huge_body_is_refused_before_it_is_read(open_session):
    url, token = open_session
    body = b" " * (9 * 2**20)
    response = httpx.post(f"{url}/chat/completions", content=body, headers={"Authorization": f"Bearer {token}"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_long")


def test_hundreds_of_waiting_requests_need_no_thread_each(open_session):
    url, token = open_session

    async def ask_often():
        limits = httpx.Limits(max_connections=300)
        async with httpx.AsyncClient(limits=limits, verify=False, headers={"Authorization": f"Bearer {token}"}) as client:
            asked = [asyncio.ensure_future(client.post(f"{url}/chat/completions", json=GOOD)) for _ in range(200)]
            await asyncio.sleep(1.0)
            threads = threading.active_count()
            for one in asked:
                one.cancel()
            return threads

    before = threading.active_count()
    assert asyncio.run(ask_often()) <= before + 5


def test_a_body_that_is_no_json_is_refused_and_the_model_is_listed(open_session):
    url, token = open_session
    headers = {"Authorization": f"Bearer {token}"}
    assert httpx.post(f"{url}/chat/completions", content=b"{", headers=headers).status_code == 400
    assert httpx.get(f"{url}/models", headers=headers).json()["data"][0]["id"] == "policy"
    assert httpx.get(f"{url}/models").status_code == 401


@pytest.mark.slow
def test_openais_own_client_gets_its_answers(monkeypatch):
    openai = pytest.importorskip("openai")
    said = []

    def agent(prompt, endpoint):
        client = openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0)
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "sk"}]
        answer = client.chat.completions.create(
            model=endpoint.model, messages=[{"role": "user", "content": parts}], temperature=0.2, max_completion_tokens=5
        )
        said.append(answer)
        return 1.0

    monkeypatch.setattr(agents, "turns", agent)
    rollout, scripted = play([[*ids("ab"), END]], "turns")
    assert rollout.prompt_ids.tolist() == opened(("user", "ask"))
    assert said[0].choices[0].message.content == "ab"
    assert said[0].choices[0].finish_reason == "stop"
    assert said[0].usage.completion_tokens == 3
    assert scripted.asked[0][1] == 5


@pytest.mark.slow
def test_the_samplers_logprobs_are_those_of_one_pass_over_each_segment():
    model = ModelSection.model_validate({"path": TINY.replace("context=96", "context=512") + "true", "dtype": "float32"})
    rollout = RolloutSection.model_validate({"backend": "transformers", "max_concurrent": 8})
    limits = section("forgetful", max_turn_tokens=6)
    engine = build_player(RolloutSpec(model, rollout, seed=0, environment=limits))
    engine.submit([request(0, sample) for sample in range(4)], temperature=1.0, max_new_tokens=200)
    played = engine.poll(4)
    engine.close()
    assert sorted(sample.key.sample for sample in played) == [0, 1, 2, 3]
    network = load_network(tie=True)
    for part in [part for sample in played for part in (sample, *sample.extra_segments)]:
        tokens = torch.from_numpy(part.sequence().token_ids).long()
        with torch.no_grad():
            logits = network(input_ids=tokens[None]).logits[0, len(part.prompt_ids) - 1 : -1]
        logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[len(part.prompt_ids) :, None])[:, 0].numpy()
        assert np.abs(logprobs - part.logprobs)[part.action_mask].max() < 1e-4
    assert all(len(sample.extra_segments) == 1 and 2 <= sample.action_mask.sum() <= 12 for sample in played)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "program"}, "missing a required argument: 'command'"),
        ({"name": "tests.environments.agents:turnes"}, "has no class or function 'turnes'; did you mean 'turns'?"),
        (
            {"name": "tests.environments.agents:turns", "arguments": {"cuont": 1}},
            "takes no argument 'cuont'; did you mean 'count'?",
        ),
    ],
)
def test_an_agent_that_is_not_there_or_not_called_so_is_refused(settings, message):
    with pytest.raises(UserError) as caught:
        find_agent(EnvironmentSection.model_validate(settings))
    assert message in str(caught.value)


def test_classes_are_environments_and_functions_are_agents():
    assert find_agent(EnvironmentSection(name="guessing")) is None
    with pytest.raises(UserError, match="is an agent, expected a class"):
        environment_maker(section("turns"))
