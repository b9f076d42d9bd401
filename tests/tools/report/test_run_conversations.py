"""Conversations in a run's page: turns, branches, paths, rewards and colors, from what the sinks of real runs store."""

import random
from pathlib import Path

import numpy as np

from rayrlhf.data.records import SEGMENT_STRIDE, Rollout, SampleKey
from rayrlhf.environments.transcript import transcript_lines
from rayrlhf.models.tiny import byte_tokenizer
from rayrlhf.observe.samples import Line, SampleSink, read_samples
from rayrlhf.tools.report.run_conversations import conversations_section
from rayrlhf.tools.report.run_page import write_run_report
from tests.tools.report import runs

TOKENIZER = byte_tokenizer()


def rollout(number, parts):
    """A sample of (sampled or not, text) parts, rewarded by 0.5 at the end."""
    ids = [TOKENIZER.encode(text) for _, text in parts]
    mask = np.concatenate([np.full(len(one), own) for (own, _), one in zip(parts, ids, strict=True)])
    response = np.concatenate(ids).astype(np.int32)
    rewards = np.zeros(len(mask), np.float32)
    rewards[-1] = 0.5
    zeros = np.zeros(len(mask))
    prompt = np.array(TOKENIZER.encode("<|im_start|>user\nask"), np.int32)
    arrays = zeros.astype(np.float32), zeros.astype(np.int32)
    return Rollout(SampleKey(0, 3, number), prompt, response, mask, *arrays, "stop", "", 0, rewards)


def stored(folder, **changes):
    """The rows of a sample with a branch, as a run writes and reads them."""
    chance, samples = random.Random(0), []
    call = '<tool_call>{"name": "add"}</tool_call>'
    for number, parts in ((0, [(True, call), (False, "42"), (True, "it is 42")]), (SEGMENT_STRIDE, [(True, "<b>no</b>")])):
        one = rollout(number, parts)
        ids = one.response_ids.tolist()
        more = {
            "prompt_id": 3,
            "sample": number,
            "tokens": [TOKENIZER.decode([token]) for token in ids],
            "token_kl": [0.3 if own else 0.0 for own in one.action_mask],
            "transcript": transcript_lines(one, TOKENIZER),
            "path": "judge" if number else "",
        }
        samples.append(runs.sample(1, 0, chance, **(more | changes)))
    SampleSink(folder).write(1, samples)
    return read_samples(folder)


def test_a_branch_begins_with_its_context_and_lines_count_their_tokens():
    lines = transcript_lines(rollout(SEGMENT_STRIDE, [(True, "ab"), (False, "c")]), TOKENIZER)
    assert lines == [
        Line("context", "<|im_start|>user\nask", 0.0, 0),
        Line("policy", "ab", 0.0, 2),
        Line("environment", "c", 0.5, 1),
    ]


def test_roles_of_the_chat_template_are_no_text_of_the_tool():
    between = "<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    lines = transcript_lines(rollout(0, [(True, "add<|im_end|>"), (False, between), (True, "42<|im_end|>")]), TOKENIZER)
    assert [line.text for line in lines] == ["add", between, "42"]


def test_turns_branches_paths_rewards_and_colors_are_shown(tmp_path: Path):
    *_, conversation = conversations_section(stored(tmp_path))
    (_, trunk), (title, branch) = conversation.branches
    assert [turn.speaker for turn in trunk] == ["policy", "environment", "policy"]
    assert ("".join(trunk[2].tokens), trunk[2].kl[0], trunk[2].reward) == ("it is 42", 0.30000001192092896, 0.5)
    assert (title, [turn.speaker for turn in branch]) == ("branch 1, path judge", ["context", "policy"])
    html = conversation.html(iter(()))
    assert html.count('<span class="up-2" title="+0.300 nats">') == 38 + 8 + 9
    assert "&lt;tool_call&gt;" in html.replace("</span>", "").replace('<span class="up-2" title="+0.300 nats">', "")
    assert "<b>" not in html
    assert "reward +0.5" in html


def test_without_a_reference_the_text_is_shown_and_without_turns_there_is_no_section(tmp_path: Path):
    *_, conversation = conversations_section(stored(tmp_path, tokens=None, token_kl=None))
    assert "it is 42" in conversation.html(iter(()))
    assert list(conversations_section([{"step": 1, "prompt": "x"}])) == []


def test_the_page_of_a_run_has_the_section(tmp_path: Path):
    folder = runs.write_run(tmp_path / "run", steps=2)
    stored(folder / "samples")
    page = write_run_report(folder).read_text()
    assert page.count('<ol class="turns">') == 2
    assert "branch 1, path judge" in page
