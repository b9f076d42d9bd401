"""Random rows through the reading code of every command: all agree on a row, and each column and key is used or named.

Each row becomes a dataset file. Every command reads it with the code of its plan, and the pipelines with that of their run
too; both must accept it or refuse it.
"""

import json
import random
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from rayrlhf.batch_inference.stored_prompts import encode_prompts
from rayrlhf.config.icl import ICLBuildConfig, ICLEvaluateConfig
from rayrlhf.config.pipelines import EvaluateConfig, PreSFTConfig
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.tuning import DPOConfig, RewardTrainingConfig, SFTConfig
from rayrlhf.data.messages import LOSS_KEYS
from rayrlhf.data.prompt_datasets import describe_columns
from rayrlhf.errors import UserError
from rayrlhf.models import start_check
from rayrlhf.models.load import load_architecture, load_tokenizer
from rayrlhf.pipelines.evaluation import evaluate_model
from rayrlhf.pipelines.icl import evaluate_icl
from rayrlhf.pipelines.icl.example_pool import describe_pool, ingest_examples, read_examples
from rayrlhf.pipelines.presft import dry_run, run_presft
from rayrlhf.pipelines.presft.presft_folder import Layout
from rayrlhf.ppo import run_prompts
from rayrlhf.rewards.functions import load_functions
from rayrlhf.tuning.direct_preference_task import DirectPreferenceTask
from rayrlhf.tuning.task import PreferenceTask, SupervisedTask

WORDS = ["", "Hi", "What is 2 + 2?", "你好吗", "a\nb", " x "]
KEYS = [
    *("prompt", "completion", "text", "messages", "conversations", "instruction", "input", "output", "question", "query"),
    *("system", "system_prompt", "chosen", "rejected", "tools", "images", "label", "labels", "completion_mask", "weight"),
    *("history", "chat_template_kwargs", "id", "score", "margin", "input_ids", "attention_mask", "response", "category"),
]
PROMPTS = {"prompt", "messages", "conversations", "question", "query", "instruction", "input", "text", "input_ids"}
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def some_message(dice, role=None):
    role = role or dice.choice(["user", "assistant", "system", "developer", "tool", "bot"])
    message = {"role": role, "content": dice.choice(WORDS[1:] if dice.random() < 0.8 else WORDS)}
    if dice.random() < 0.1:
        message["content"] = [{"type": dice.choice(["text", "text", "image"]), "text": "t"}]
    more = {"weight": dice.choice([0, 1, 0.5]), "name": "n", "reasoning_content": "r", "tool_calls": [CALL], "note": "k"}
    return message | {key: value for key, value in more.items() if dice.random() < 0.04}


def some_turns(dice, last):
    if dice.random() < 0.2:
        return [some_message(dice) for _ in range(dice.randint(0, 4))]
    roles = ["user", "assistant"] * 2 if last == "assistant" else ["user", "assistant", "user"]
    return [some_message(dice, role) for role in roles[-2 * dice.randint(1, 2) + (last == "user") :]]


def some_value(dice, key):
    if key in ("messages", "conversations") or (key in ("prompt", "completion", "chosen", "rejected") and dice.random() < 0.2):
        return some_turns(dice, "user" if key == "prompt" else "assistant")
    if key in ("labels", "input_ids", "attention_mask", "completion_mask"):
        return [dice.randint(-1, 1) for _ in range(2)]
    if key == "tools" and dice.random() < 0.7:
        return [{"type": "function", "function": {"name": "f"}}]
    words = [dice.choice(WORDS[1:]) for _ in range(9)]
    return dice.choice([*words, "", None, 3, True, False, [], ["x"], {"a": 1}])


def some_row(dice):
    core = dice.choice(
        [("prompt", "completion"), ("instruction", "input", "output"), ("messages",), ("prompt", "chosen", "rejected"), ()]
    )
    keys = dict.fromkeys([*core, *dice.sample(KEYS, dice.choice([0, 1, 1, 2, 3]))])
    row = {key: some_value(dice, key) for key in keys}
    usual = {"prompt": "Who?", "completion": "I.", "instruction": "Add.", "output": "3", "chosen": "good", "rejected": "bad"}
    return row | {key: usual[key] for key in core if key in usual and dice.random() < 0.6}


@dataclass
class Reading:
    """What a command reads: rendered prompt or whole texts, the response, and its words on columns and keys."""

    prompt: str | None = None
    whole: tuple[str, ...] = ()
    response: str | None = None
    used: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    keys: frozenset[str] | None = None


def named(line):
    """Return used and unused columns of a line of a plan, and unused keys."""
    parts = line.split("read as ", 1)[1].split(": ", 1)[1].split("; ")
    found = {"used": parts[0]} | dict(part.split(": ", 1) for part in parts[1:])
    keys = frozenset(found.get("message keys that are not used", "").split(", "))
    return frozenset(found["used"].split(", ")), frozenset(found.get("not used", "").split(", ")) - {""}, keys


class Commands:
    """Configurations of all commands over one dataset file."""

    def __init__(self, folder, patch):
        self.folder, self.file = folder, folder / "rows.jsonl"
        (folder / "template.jinja").write_text(TEMPLATE)
        (folder / "reward.py").write_text("def score(responses):\n    return [0.0] * len(responses)\n")
        model = {"path": "builtin:tiny?context=1024", "chat_template": str(folder / "template.jinja"), "dtype": "float32"}
        data, run = {"path": str(self.file)}, {"name": "a", "root": str(folder / "runs")}
        reward = {"functions": [{"name": f"{folder}/reward.py:score"}]}
        both = {"train": data, "evaluation": data}
        self.sft = SupervisedTask(SFTConfig.model_validate({"model": model, "data": {"train": data}}))
        self.reward = PreferenceTask(RewardTrainingConfig.model_validate({"model": model, "data": both}))
        self.dpo = DirectPreferenceTask(DPOConfig.model_validate({"model": model, "data": both}))
        off = {"enabled": False}
        self.ppo = PPOConfig.model_validate({"model": model, "data": {"train": data}, "reward": reward, "evaluation": off})
        self.evaluate = EvaluateConfig.model_validate({"run": run, "model": model, "data": data, "reward": reward})
        self.functions = load_functions(self.ppo.reward)
        self.presft = PreSFTConfig.model_validate({"run": run, "model": model, "data": data})
        self.build = ICLBuildConfig.model_validate({"run": run, "model": model, "data": data})
        shots = {"counts": [0]}
        self.curve = ICLEvaluateConfig.model_validate(
            {"run": run, "models": {"m": model}, "data": data, "demonstrations": shots, "metric": "accuracy"}
        )
        self.tokenizer = load_tokenizer(self.ppo.model)
        architecture = load_architecture(self.ppo.model)
        for module in (run_prompts, evaluate_model):
            patch.setattr(module, "load_tokenizer", lambda _: self.tokenizer)
            patch.setattr(module, "load_architecture", lambda _: architecture)
        patch.setattr(start_check, "load_architecture", lambda _: architecture)
        patch.setattr(evaluate_model, "check_generating_model", lambda *_: None)
        patch.setattr(run_presft, "_tokenizer_and_limit", lambda _: (self.tokenizer, 1024))
        self.all = {
            "sft": lambda: self.tuned(self.sft),
            "reward": lambda: self.tuned(self.reward),
            "dpo": lambda: self.tuned(self.dpo),
            "ppo": lambda: self.prompted(run_prompts.load_prompts(self.ppo)[0], self.ppo.data.train),
            "evaluate": lambda: self.prompted(
                evaluate_model.load_evaluation_prompts(self.evaluate, self.functions), self.evaluate.data
            ),
            "presft": self.prepared,
            "icl build": self.built,
            "icl evaluate": self.questioned,
        }

    def read(self, row):
        """Return the readings of the commands that accept a row, and the refusals of the others."""
        self.file.write_text(json.dumps(row) + "\n")
        readings, refusals = {}, {}
        for name, command in self.all.items():
            try:
                readings[name] = command()
            except UserError as error:
                refusals[name] = str(error)
        return readings, refusals

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def tuned(self, task):
        table, _, report = task.load(self.tokenizer)
        answers = getattr(table, "answers", table)
        whole = tuple(self.decode(part) for part in (answers.token_ids[s:e] for s, e in pairwise(answers.offsets)))
        return Reading(whole=whole, used=report.used, unused=report.unused, keys=report.unwritten)

    def prompted(self, prompts, section):
        used, unused, _ = named(describe_columns(section, prompts, frozenset()))
        return Reading(self.decode(prompts[0].token_ids), used=used, unused=unused)

    def planned(self, plan, run):
        """Return the first line of a plan and what the run reads; both accept the row or refuse it."""
        found = []
        for call in (plan, run):
            try:
                found.append(call())
            except UserError as error:
                found.append(error)
        refused = [isinstance(one, UserError) for one in found]
        assert len(set(refused)) == 1, found
        if refused[0]:
            raise found[0]
        return found

    def prepared(self):
        def run():
            shutil.rmtree(self.folder / "runs", ignore_errors=True)
            layout = Layout(self.presft.run.folder)
            run_presft.Run(self.presft, layout, None).prepare()
            return next(iter(layout.rows.rows()))

        line, row = self.planned(lambda: next(dry_run.describe_data(self.presft)), run)
        (ids,) = encode_prompts(self.tokenizer, self.presft.data, [row["prompt"]], [row["messages"]], [1])
        used, unused, keys = named(line)
        return Reading(self.decode(ids), response=row["response"], used=used, unused=unused, keys=keys)

    def built(self):
        def run():
            shutil.rmtree(self.folder / "pool", ignore_errors=True)
            return next(read_examples(self.build.data, ingest_examples(self.build.data, self.folder / "pool", 8)))[0]

        return self.example(*self.planned(lambda: describe_pool(self.build.data), run))

    def questioned(self):
        def run():
            shutil.rmtree(self.folder / "curve", ignore_errors=True)
            return evaluate_icl._QuestionSet.read(self.curve, self.folder / "curve").targets[0]

        return self.example(*self.planned(lambda: next(evaluate_icl.describe_data(self.curve)), run))

    def example(self, line, example):
        used, unused, keys = named(line)
        turns = [{"role": "user", "content": example.prompt}]
        prompt = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return Reading(prompt, response=example.answer, used=used, unused=unused, keys=keys)


@pytest.fixture(scope="module")
def commands():
    # Flushes to a disk were a third of the time.
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Commands(Path(folder), patch)


def check_columns(row, name, reading):
    """Check that each column is used or named, and each key of a message in a used column is in the text or named."""
    missing = {key for key, value in row.items() if value is not None} - reading.used - reading.unused
    assert not missing, (name, missing, row)
    if reading.keys is None:
        return
    text = "".join([*reading.whole, reading.prompt or "", reading.response or ""])
    for column in reading.used:
        turns = row.get(column)
        for message in turns if isinstance(turns, list) else []:
            more = message.keys() - {"role", "content", *LOSS_KEYS} if isinstance(message, dict) and "role" in message else ()
            for key in more:
                value = '<call>{"name": "f"' if key == "tool_calls" else message[key]
                assert key in reading.keys or value in text, (name, key, row)


def check_agreement(row, readings, compared):
    """Check that commands which read the same columns read the same prompt and response."""
    several = {key for key in PROMPTS & row.keys() if row[key] is not None and (key != "input" or "instruction" not in row)}
    if len(several) > 1:
        return
    prompts = {name: reading.prompt for name, reading in readings.items() if reading.prompt is not None}
    assert len(set(prompts.values())) <= 1, (prompts, row)
    responses = {reading.response for reading in readings.values() if reading.response is not None}
    assert len(responses) <= 1, (responses, row)
    whole = {name: reading.whole for name, reading in readings.items() if reading.whole}
    if {"reward", "dpo"} <= whole.keys():
        assert whole["reward"] == whole["dpo"], row
    for name, texts in whole.items():
        for prompt in set(prompts.values()):
            if not ({"text", "input_ids"} & readings[name].used):
                assert all(text.startswith(prompt) for text in texts), (name, texts, prompt, row)
                compared[name] += 1
                for response in responses if name == "sft" else ():
                    assert texts[0][len(prompt) :].startswith(response), (texts, response, row)
    compared["prompts"] += len(prompts) > 1


def check_rows(commands, count):
    dice, accepted, compared = random.Random(0), Counter(), Counter()
    for number in range(count):
        row = some_row(dice)
        readings, refusals = commands.read(row)
        for name, text in refusals.items():
            assert "\n" not in text, (name, text)
            assert "rows.jsonl" in text, (name, text)
        for name, reading in readings.items():
            accepted[name] += 1
            check_columns(row, name, reading)
        check_agreement(row, readings, compared)
        unused = {name: reading.unused & row.keys() for name, reading in readings.items()}
        if number % 5 == 0 and any(unused.values()):
            for name, columns in unused.items():
                # A column that repeats a used one may be what its format is recognized by.
                used = [row[column] for column in readings[name].used if column in row]
                if any(row[column] in used for column in columns):
                    continue
                again, _ = commands.read({key: value for key, value in row.items() if key not in columns})
                texts = [(one.prompt, one.whole, one.response) for one in (readings[name], again[name])]
                assert texts[0] == texts[1], (name, columns, row)
    assert min(accepted[name] for name in commands.all) > count / 60, accepted
    assert min(compared[name] for name in ("sft", "reward", "dpo", "prompts")) > count / 100, compared


def test_all_commands_agree_on_random_rows(commands):
    check_rows(commands, 200)


@pytest.mark.parametrize("count", [pytest.param(1000, marks=pytest.mark.slow), pytest.param(3000, marks=pytest.mark.nightly)])
def test_all_commands_agree_on_many_random_rows(commands, count):
    check_rows(commands, count)
