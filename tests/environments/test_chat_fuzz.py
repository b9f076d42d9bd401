"""Random conversations of agents over chat templates of many families: what is trained is what was sampled, token by token.

The sampler writes bytes where the tokenizer would write longer tokens, so any text that is encoded again shows.
"""

import json
import random
from concurrent.futures import Future

import numpy as np
import pytest

from rayrlhf.data.records import Prompt, Rollout, RolloutRequest, SampleKey
from rayrlhf.environments.chat_tokens import ChatTokens
from rayrlhf.environments.endpoint.call import Call, Refusal
from rayrlhf.environments.endpoint.output_parser import Parsed
from rayrlhf.environments.players.agent_session import Session, Texts
from tests.environments.chat_families import families, tokenizer_of

FAMILIES = families()
SCHEMA = {"type": "object", "properties": {}}
TOOL = {"type": "function", "function": {"name": "add", "description": "sum", "parameters": SCHEMA}}
MANY = 200
"""Conversations of a chat template in the nightly test."""
WORDS = ("then", "see", "ok", "\n", " ", "an answer", "{}", "é", "the sheep", "?", '"}', "42", "\t", "<b>")


class Sampled:
    """Stands for the parsers: it knows what the sampler meant."""

    def __init__(self):
        self.meant = {}

    def check(self, call): ...

    def constraint(self, call, opening): ...

    def parse(self, ids, text, call, opening):
        return self.meant[tuple(ids)]


def words(rng, most=6):
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(0, most)))


class Conversation:
    """One sample with a client that edits what it sends back."""

    def __init__(self, rng, tokenizer, end, texts):
        self.rng, self.tokenizer, self.texts = rng, tokenizer, texts
        self.end = tokenizer.convert_tokens_to_ids(end)
        prompt = np.array([1], np.int32)
        request = RolloutRequest(SampleKey(0, 0, 0), prompt, 7, Prompt(0, "", prompt))
        self.session = Session(request, 100_000, 100, None, None, 0, "", Future(), {}, 0.0)
        self.tools = [TOOL] if texts.chat.writes_tools and rng.random() < 0.7 else []
        self.sampled, self.kept, self.gone_on = [], 0, 0
        self.last = None

    def answer(self):
        """Sampled bytes, and what they mean."""
        rng = self.rng
        text, reasoning, calls = words(rng), "", []
        if self.texts.chat.reasoning_key and rng.random() < 0.4:
            reasoning = f"thought {rng.random()}"
        if self.tools and rng.random() < 0.5:
            arguments = {key: rng.choice([1, "two", [3], {"é": None}]) for key in ("a", "b")}
            calls = [
                {"id": f"id{rng.random()}", "type": "function", "function": {"name": "add", "arguments": json.dumps(arguments)}}
                for _ in range(rng.randint(1, 2))
            ]
        raw = f"{reasoning}|{text}|{json.dumps(calls)}|{rng.random()}"
        ids = [3 + byte for byte in raw.encode()]
        self.texts.parser.meant[tuple(ids)] = Parsed(text, reasoning, calls)
        return [*ids, self.end] if rng.random() < 0.8 else ids

    def ask(self, messages, count=1):
        """Return the completions of a request as a client reads them, or None if it was refused."""
        call = Call("", messages, tools=self.tools, count=count)
        try:
            places, _ = self.session.open(call, self.texts)
        except Refusal as refusal:
            if refusal.code == "invalid_messages":  # the template refuses it
                return None
            raise
        requests = self.session.start(places)
        for place, request in zip(places, requests, strict=True):
            ids = self.answer()
            reason = "stop" if ids[-1] == self.end else "length"
            said = np.array(ids, np.int32)
            ones = np.ones(len(ids))
            self.sampled.append((request.prompt_ids.tolist(), ids))
            arrays = ones.astype(bool), -ones.astype(np.float32), ones.astype(np.int32)
            turn = Rollout(request.key, request.prompt_ids, said, *arrays, reason, "", 0)
            self.session.complete(place, turn, 1, self.texts)
        return call.reply.result()

    def returned(self, completion):
        """The client's own form of a completion: blanks, JSON order, ids and reasoning may differ."""
        rng, text = self.rng, completion.text
        text = rng.choice([text, text.strip(), " ".join(text.split()), text + "\n"])
        message = {"role": "assistant", "content": text}
        if completion.tool_calls:
            calls = []
            for call in completion.tool_calls:
                arguments = json.loads(call["function"]["arguments"])
                items = list(arguments.items())
                rng.shuffle(items)
                calls.append({"id": call["id"], "type": "function", "function": {"name": "add", "arguments": dict(items)}})
            message["tool_calls"] = calls
        if completion.reasoning and rng.random() < 0.5 and self.texts.chat.reasoning_key:
            message[self.texts.chat.reasoning_key] = completion.reasoning + rng.choice(["", "\n"])
        return message

    def play(self):
        """Return True if nothing was edited and there was no reasoning, which some templates drop from what was said before."""
        rng = self.rng
        system = [{"role": "system", "content": "Be brief."}] if rng.random() < 0.3 else []
        messages = [*system, {"role": "user", "content": "q" + words(rng)}]
        paths, plain = [messages], True
        for _ in range(rng.randint(1, 5)):
            doing = rng.random()
            if doing < 0.75:
                at = len(paths) - 1
            elif doing < 0.9:  # a retry, or a branch from an earlier place
                at, plain = rng.randrange(len(paths)), False
            else:  # the history is summed up
                paths.append([{"role": "user", "content": "sum " + words(rng)}])
                at, plain = len(paths) - 1, False
            count = rng.choice([1, 1, 1, 2, 3])
            said = self.ask(paths[at], count)
            if said is None:
                paths, plain = [messages], False
                continue
            plain = plain and count == 1 and not said[0].reasoning
            picked = rng.choice(said)
            history = [*paths[at], self.returned(picked)]
            for call in picked.tool_calls:
                history.append({"role": "tool", "content": '{"sum": 3}', "tool_call_id": call["id"], "name": "add"})
            if not picked.tool_calls or rng.random() < 0.2:
                history.append({"role": "user", "content": "more " + words(rng)})
            paths.append(history)
        return plain

    def check(self):
        rollout = self.session.rollout({"": 1.0}, self.tokenizer)
        if rollout is None:
            assert not self.sampled
            return 0
        segments = [rollout, *rollout.extra_segments]
        found = []
        for segment, owner in zip(segments, [one for one in self.session.segments if one.turns], strict=True):
            tokens, start = [*segment.prompt_ids.tolist(), *segment.response_ids.tolist()], len(segment.prompt_ids)
            mask = segment.action_mask
            assert mask.any()
            assert (segment.logprobs[mask] == -1).all()
            assert not segment.logprobs[~mask].any()
            for span in owner.transcript.spans:
                assert mask[span.start : span.end].all() if span.owner == "policy" else not mask[span.start : span.end].any()
            ends = [turn.end for turn in owner.turns]
            spans = [span for span in owner.transcript.spans if span.owner == "policy"]
            assert [span.end for span in spans] == ends
            found += [(tokens[: start + span.start], tokens[start + span.start : start + span.end]) for span in spans]
        # Every sampled token is trained once, after exactly the tokens that the sampler saw.
        assert sorted(found) == sorted(self.sampled)
        return len(segments)


def texts_of(name):
    tokenizer, end = tokenizer_of(name, FAMILIES[name])
    return tokenizer, end, Texts(tokenizer, ChatTokens(tokenizer), Sampled())


def fuzz(name, count):
    tokenizer, end, texts = texts_of(name)
    plain = one = 0
    for seed in range(count):
        conversation = Conversation(random.Random(f"{name}{seed}"), tokenizer, end, texts)
        only_extended = conversation.play()
        segments = conversation.check()
        plain += only_extended
        one += only_extended and segments == 1
        texts.parser.meant.clear()
    return plain, one


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_trained_tokens_are_the_sampled_ones_whatever_the_client_sends_back(name):
    plain, one = fuzz(name, 12)
    assert one == plain


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_trained_tokens_are_the_sampled_ones_in_hundreds_of_conversations(name):
    assert MANY * len(FAMILIES) >= 5000
    plain, one = fuzz(name, MANY)
    assert one == plain > 0
