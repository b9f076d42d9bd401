"""Random rows: all readers agree on prompt and answer, and each column is used, named as unused, or refused.

`sft` reads samples, `dpo` and `reward` pairs, `ppo` and `evaluate` prompts; `presft` and `icl build` read examples, and
`icl evaluate` examples whose answer may be missing.
"""

import random
from collections import Counter

from rayrlhf.batch_inference.ingest import RejectedError, _pair
from rayrlhf.batch_inference.source import SourceRow
from rayrlhf.config.batch_inference import PairsSection
from rayrlhf.config.data import DatasetSection, PreferenceDataSection, SupervisedDataSection
from rayrlhf.data.dataset_rows import Rows
from rayrlhf.data.prompt_datasets import _prompt_of
from rayrlhf.data.row_columns import ANSWERS, recognized, used_extras
from rayrlhf.data.supervised.row_formats import preference_shape, supervised_shape, used_columns
from rayrlhf.data.supervised.supervised_rows import InvalidRowError, write_pair, write_supervised
from rayrlhf.data.templates import conversation
from rayrlhf.errors import UserError

WORDS = ["", "Hi", "What is 2 + 2?", "你好吗", "a\nb", " x "]
KEYS = [
    "prompt completion text messages conversations instruction input output question system system_prompt chosen rejected",
    "tools images label labels completion_mask weight history chat_template_kwargs id score margin input_ids attention_mask",
]


def some_message(dice):
    message = {"role": dice.choice(["user", "assistant", "system", "developer", "tool", "bot"]), "content": dice.choice(WORDS)}
    if dice.random() < 0.2:
        message["content"] = [{"type": dice.choice(["text", "image"]), "text": "t"}]
    for key, value in {"weight": dice.choice([0, 1, 0.5]), "name": "n", "reasoning_content": "r", "tool_calls": [1]}.items():
        if dice.random() < 0.05:
            message[key] = value
    return message


def some_value(dice, key):
    if key in ("messages", "conversations") or (key in ("prompt", "completion", "chosen", "rejected") and dice.random() < 0.3):
        return [some_message(dice) for _ in range(dice.randint(0, 4))]
    if key in ("labels", "input_ids", "attention_mask", "completion_mask"):
        return [dice.randint(-1, 1) for _ in range(2)]
    kinds = [dice.choice(WORDS), dice.choice(WORDS), dice.choice(WORDS), None, 3, True, [], ["x"], {"a": 1}]
    return dice.choice(kinds)


def some_row(dice):
    core = dice.choice(
        [("prompt", "completion"), ("instruction", "input", "output"), ("messages",), ("chosen", "rejected"), ()]
    )
    keys = {*core, *dice.sample(" ".join(KEYS).split(), dice.randint(0, 3))}
    return {key: some_value(dice, key) for key in keys}


def supervised_prompt(row, outcomes):
    data = SupervisedDataSection.model_validate({"train": {"path": "f"}})
    section, _ = recognized(row, data.train, "samples")
    shape = supervised_shape(row, section, "f")
    written = write_supervised(row, 1, shape, section, data)
    used = set(used_columns(shape, section)) | used_extras(row, section, ANSWERS)
    outcomes["sft"] += 1
    if shape.format == "tokens":
        return None
    for column in ("tools", "system", "images", "history", "input", "completion_mask"):
        assert column in used or row.get(column) in (None, "", []), (column, row)
    if not isinstance(written.prompt, list):
        return None
    return written.prompt[-1]["content"], written.answers[0][-1]["content"]


def prompt(row, outcomes):
    section, layout = recognized(row, DatasetSection(path="f"), "prompts")
    read, _ = _prompt_of(Rows("f", [row], [1], section.prompt_field, layout), 0, section, chat=True)
    outcomes["ppo"] += 1
    return conversation(read, None)[-1]["content"], None


def example_prompt(row, outcomes):
    section, _ = recognized(row, PairsSection(path="f"), "examples")
    read = _pair(section, SourceRow(1, row), None, True, {})
    outcomes["icl"] += 1
    assert row.get("label") is not False
    return read["prompt"], read["response"]


def question(row, outcomes):
    section, _ = recognized(row, PairsSection(path="f"), "examples")
    read = _pair(section, SourceRow(1, row), None, False, {})
    outcomes["icl evaluate"] += 1
    return read["prompt"], read["response"] or None


def pair(row, outcomes):
    data = PreferenceDataSection.model_validate({"train": {"path": "f"}})
    section, _ = recognized(row, data.train, "pairs")
    written = write_pair(row, 1, preference_shape(row, section, "f"), section, data)
    outcomes["dpo"] += 1
    assert written.answers[0] != written.answers[1]


def test_all_readers_agree_on_3000_random_rows():
    dice, outcomes, refusals = random.Random(0), Counter(), []
    for _ in range(3000):
        row, read = some_row(dice), []
        for reader in (supervised_prompt, prompt, example_prompt, question, pair):
            try:
                read.append(reader(row, outcomes))
            except (UserError, InvalidRowError, RejectedError) as error:
                refusals.append(str(error))
        prompts = {found[0] for found in read if found is not None}
        answers = {found[1] for found in read if found is not None and found[1] is not None}
        # A row can have prompts of several formats; the commands then read one of them or refuse.
        several = {"messages", "conversations", "question"} & row.keys()
        assert len(prompts) <= 1 or several, (row, read)
        assert len(answers) <= 1 or several, (row, read)
    assert min(outcomes[name] for name in ("sft", "ppo", "icl", "icl evaluate", "dpo")) > 5, outcomes
    assert all(refusals)
    assert "\n" not in "".join(refusals)
