"""Files and formats that people have: each row is read whole, or refused by name, by every reader."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrlhf.batch_inference.ingest import describe_examples, ingest_dataset
from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.config.batch_inference import PairsSection
from rayrlhf.config.data import DataSection, DatasetSection
from rayrlhf.config.icl import ExamplesSection
from rayrlhf.data.dataset_rows import read_rows
from rayrlhf.data.prompt_datasets import describe_columns, prepare_prompts
from rayrlhf.errors import UserError
from rayrlhf.pipelines.icl.example_pool import describe_pool
from tests.data.supervised_files import assistant, error_of, preferences, supervised, system, user

ROW = {"prompt": "a", "completion": "b"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
TOOL_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_zst(path: Path, text: bytes) -> None:
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as file:
        file.write(text)


def whole(tokenizer, sample):
    return tokenizer.decode(sample.token_ids)


def learned(tokenizer, sample):
    return tokenizer.decode(sample.token_ids[sample.loss_mask])


def read(path, **fields):
    return read_rows(DatasetSection(path=str(path), **fields)).values


def refusal(path, **fields):
    with pytest.raises(UserError) as caught:
        read_rows(DatasetSection.model_validate({"path": path if isinstance(path, list) else str(path), **fields}))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.json", f"[{json.dumps(ROW)}, {json.dumps(ROW)}]"),
        ("array.jsonl", f"[{json.dumps(ROW)}, {json.dumps(ROW)}]"),
        ("pretty.jsonl", f"[\n  {json.dumps(ROW)},\n\n  {json.dumps(ROW)}\n]\n"),
        ("lines.json", f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n"),
        ("rows.csv", "prompt,completion\na,b\na,b\n"),
        ("bom.csv", "\ufeffprompt,completion\r\na,b\r\na,b\r\n"),
        ("rows.tsv", "prompt\tcompletion\na\tb\na\tb\n"),
    ],
)
@pytest.mark.parametrize("pack", ["", ".gz", ".zst"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, content, pack):
    path, data = tmp_path / f"{name}{pack}", content.encode()
    if pack == ".zst":
        write_zst(path, data)
    else:
        path.write_bytes(gzip.compress(data) if pack else data)
    assert read(path) == [ROW, ROW]
    assert read(path, limit=1) == [ROW]


def test_several_files_globs_and_folders_are_one_dataset_and_errors_name_the_file(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "1"}) + "\n")
    (tmp_path / "b.json").write_text(json.dumps([{"prompt": "2"}, {"prompt": "3"}]))
    (tmp_path / "c.csv").write_text("prompt\n4\n")
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.json", "c.csv")]
    expected = [{"prompt": str(number)} for number in (1, 2, 3, 4)]
    section = DatasetSection.model_validate({"path": paths})
    assert DatasetSection.model_validate(section.model_dump()) == section
    assert read_rows(section).values == read(tmp_path) == read(tmp_path / "*.*") == expected
    assert read(tmp_path, limit=2) == expected[:2]
    (tmp_path / "b.json").write_text(json.dumps([{"prompt": "2"}, {"prompt": ""}]))
    with pytest.raises(UserError, match=r"b\.json: row 2: prompt: the prompt is empty"):
        prepare_prompts(section, DataSection(train=section), tokenizer, 99)
    (tmp_path / "b.json").write_text(json.dumps([{"prompt": "2"}, 3]))
    assert f"{tmp_path}/b.json: row 2: expected a JSON object, found int" in refusal(tmp_path)
    assert "no file matches" in refusal(tmp_path / "*.parquet")
    assert f"{tmp_path}/b.json: row 2" in refusal([paths[0], paths[1]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer and not the data"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer and not the data"),
        ("a.jsonl", b'{"prompt": "x \\ud83d"}\n', "row 1: prompt: a lone surrogate at character 3"),
        ("a.json", b'[{"prompt": ["x \\ud83d"]}]\n', ": a lone surrogate at character 3"),
        ("a.jsonl", b'{"prompt": "x", "n": ' + b"1" * 5000 + b"}\n", "row 1: an integer of more than 4300 digits"),
        ("a.jsonl", b'{"prompt": ' + b"[" * 200_000 + b"\n", "row 1: nested too deep"),
        ("a.csv", b"prompt,n\nx,1\ny\n", "row 2 (line 3): 1 fields, expected 2: prompt, n"),
        ("a.csv", b"prompt\nx\n\xff\n", "not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 9, mtime=0)[:-9], "cannot be read"),
        ("a.zip", b"PK", "expected a file ending in .jsonl"),
        ("a.json", b'{\n "prompt": "x"\n}', "one JSON object with prompt; expected an array"),
    ],
)
def test_a_damaged_file_is_named_with_its_row(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    found = refusal(tmp_path / name)
    assert found.startswith(f"{tmp_path}/{name}: ")
    assert message in found


def test_a_damaged_parquet_page_is_named_with_its_row(tmp_path):
    pq.write_table(pa.table({"prompt": [f"{n} {random.Random(n).random()}" for n in range(5000)]}), tmp_path / "a.parquet")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[40:4000] = bytes(3960)
    (tmp_path / "a.parquet").write_bytes(data)
    assert refusal(tmp_path / "a.parquet").startswith(f"{tmp_path}/a.parquet: row ")


@pytest.mark.parametrize(
    ("row", "text", "target", "layout"),
    [
        (
            {"instruction": "Translate.", "input": "The cat", "output": "Le chat"},
            "user\nTranslate.\n\nThe cat<|im_end|>",
            "Le chat<|im_end|>\n",
            "Alpaca instructions: input, instruction, output",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 1},
            "user\na<|im_end|>",
            "b<|im_end|>\n",
            "ShareGPT conversations: conversations; not used: id",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, assistant("b")]},
            "user\na<|im_end|>",
            "b<|im_end|>\n",
            "conversations: messages",
        ),
        (
            {"messages": json.dumps([user("a"), assistant("b")])},
            "user\na<|im_end|>",
            "b<|im_end|>\n",
            "conversations: messages",
        ),
        (
            {"messages": [{"role": "developer", "content": "S"}, user("a"), assistant("b")]},
            "system\nS<|im_end|>\n<|im_start|>user\na",
            "b<|im_end|>\n",
            "conversations: messages",
        ),
        (
            {"system": "S", "prompt": "a", "completion": "b"},
            "system\nS<|im_end|>\n<|im_start|>user\na",
            "b<|im_end|>\n",
            "prompts with answers: completion, prompt, system",
        ),
        (
            {"messages": [user("a"), {**assistant("no"), "weight": 0}, user("?"), {**assistant("yes"), "weight": 1}]},
            "assistant\nno<|im_end|>",
            "yes<|im_end|>\n",
            "conversations: messages",
        ),
        (
            {"input_ids": [72, 105, 33, 89, 0], "attention_mask": [1, 1, 1, 1, 0], "labels": [-100, -100, -100, 89, -100]},
            "",
            None,
            "tokens: attention_mask, input_ids, labels",
        ),
    ],
)
def test_a_format_is_recognized_by_its_columns_and_said(tmp_path, tokenizer, row, text, target, layout):
    dataset = supervised(tmp_path, [row], tokenizer)
    (sample,) = dataset.samples
    assert text in whole(tokenizer, sample)
    if target is None:
        assert (len(sample.token_ids), sample.loss_mask.tolist()) == (4, [False, False, False, True])
    else:
        assert learned(tokenizer, sample) == target
    assert dataset.report.lines()[1].endswith(f"read as {layout}")


def test_kto_answers_with_label_false_are_dropped_and_counted(tmp_path, tokenizer):
    rows = [{"prompt": "q", "completion": "good", "label": True}, {"prompt": "q", "completion": "bad", "label": False}]
    dataset = supervised(tmp_path, rows, tokenizer)
    assert [learned(tokenizer, sample) for sample in dataset.samples] == ["good<|im_end|>\n"]
    assert dataset.report.dropped == {"label is false": 1}


def test_tools_calls_and_reasoning_go_through_the_chat_template_or_are_refused(tmp_path, tokenizer):
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = {
        "messages": [
            user("Weather?"),
            called,
            {"role": "tool", "content": "rain"},
            {**assistant("Rain."), "reasoning_content": "r"},
        ],
        "tools": TOOLS,
    }
    assert "tool_calls: the chat template does not write it" in error_of(
        supervised, tmp_path, [{"messages": row["messages"]}], tokenizer
    )
    assert "tools: the chat template does not write it" in error_of(
        supervised, tmp_path, [{"prompt": "a", "completion": "b", "tools": TOOLS}], tokenizer
    )
    old = {"role": "assistant", "content": "", "function_call": CALL["function"]}
    assert "tool_calls" in error_of(supervised, tmp_path, [{"messages": [user("a"), old]}], tokenizer)
    thought = [{"messages": [user("a"), {**assistant("b"), "reasoning_content": "r"}]}]
    assert "reasoning_content: the chat template does not write it" in error_of(supervised, tmp_path, thought, tokenizer)
    named = [{"messages": [user("a"), {**assistant("b"), "name": "bot"}]}]
    assert supervised(tmp_path, named, tokenizer).report.unwritten == {"name"}
    tokenizer.chat_template = TOOL_TEMPLATE
    (sample,) = supervised(tmp_path, [row], tokenizer, max_length=4096).samples
    assert whole(tokenizer, sample).startswith('<tools>[{"type": "function"')
    call = '<call>{"name": "weather", "arguments": {"city": "Bern"}}</call><|im_end|>\n'
    assert learned(tokenizer, sample) == f"{call}<think>r</think>Rain.<|im_end|>\n"
    section = DatasetSection(path=str(tmp_path / "rows.jsonl"), prompt_field="messages")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": row["messages"][:3], "tools": TOOLS}) + "\n")
    (prompt,) = prepare_prompts(section, DataSection(train=section), tokenizer, 9999).prompts
    assert tokenizer.decode(prompt.token_ids).startswith("<tools>")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"system": "S", "question": "q", "chosen": "x", "rejected": "y"}, "system\nS<|im_end|>\n<|im_start|>user\nq<"),
        ({"prompt": "q", "chosen": [user("q"), assistant("x")], "rejected": [user("q"), assistant("y")]}, "user\nq<"),
        ({"prompt": "q", "chosen": [assistant("x")], "rejected": [assistant("y")]}, "user\nq<"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: x", "rejected": "\n\nHuman: q\n\nAssistant: y"}, "user\nq<"),
    ],
)
def test_pairs_of_all_formats_keep_their_prompt(tmp_path, tokenizer, row, text):
    (pair,) = preferences(tmp_path, [row], tokenizer).samples
    assert text in whole(tokenizer, pair.chosen)
    assert [learned(tokenizer, part) for part in (pair.chosen, pair.rejected)] == ["x<|im_end|>\n", "y<|im_end|>\n"]


@pytest.mark.parametrize(
    ("load", "row", "message"),
    [
        (supervised, {**ROW, "input": "c"}, "input: usually a part of the prompt, and not used; put {input} into template"),
        (supervised, {**ROW, "images": ["x"]}, "images: not supported"),
        (supervised, {**ROW, "completion_mask": [0, 1]}, "completion_mask: defines the loss"),
        (supervised, {**ROW, "label": 0}, "label: 0 or 1, a score or a class, expected true or false"),
        (supervised, {"text": "a", "system": "S"}, "system: not supported with plain text"),
        (supervised, {"prompt": "one two three", "completion": "one two three four"}, "completion: repeats the prompt"),
        (supervised, {"prompt": [user("a")], "completion": [user("a"), assistant("b")]}, "repeats the messages of the prompt"),
        (
            supervised,
            {"prompt": [user("a")], "completion": [user("b"), assistant("c")]},
            "message 1 is from the user, expected the",
        ),
        (supervised, {"text": "a", "instruction": "b", "input": "c"}, "input: usually a part of the prompt"),
        (preferences, {"chosen": "a", "rejected": "b", "conversations": [user("c")]}, "conversations: usually the prompt"),
        (supervised, {"messages": [user(" "), assistant("b")]}, "message 1: the prompt is empty"),
        (supervised, {"messages": [user("a"), {**assistant("b"), "weight": 0.5}]}, "weight: expected 0, 1, true or false"),
        (supervised, {"messages": [user("a"), {**assistant("b"), "images": ["x"]}]}, "images: not supported"),
        (supervised, {"messages": [system("S"), user("a"), assistant("b")], "system": "T"}, "two system messages"),
        (supervised, {"input_ids": [5, 6], "labels": [5, 7]}, "labels: 7, expected the token itself or -100"),
        (
            preferences,
            {"prompt": [user("a")], "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            "chosen: repeats the messages of the prompt",
        ),
        (
            preferences,
            {"prompt": "other", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            "prompt: not in the conversations next to it",
        ),
    ],
)
def test_what_would_change_text_or_loss_is_refused(tmp_path, tokenizer, load, row, message):
    assert message in error_of(load, tmp_path, [row], tokenizer)


def test_a_column_can_be_ignored_on_purpose_and_a_template_takes_any(tmp_path, tokenizer):
    row = {**ROW, "input": "c"}
    dataset = supervised(tmp_path, [row], tokenizer, {"ignored_fields": ["input"]})
    assert dataset.report.unused == {"input"}
    (sample,) = supervised(tmp_path, [row], tokenizer, {"template": "{input}: {prompt} {{prompt}}"}).samples
    assert "user\nc: a {prompt}<|im_end|>" in whole(tokenizer, sample)
    assert "template: no column inptu" in error_of(
        supervised, tmp_path, [row], tokenizer, {"template": "{inptu}{prompt}{input}"}
    )
    (sample,) = supervised(tmp_path, [{"q": "a", "completion": "b"}], tokenizer, {"template": "Q: {q}"}).samples
    assert "user\nQ: a<" in whole(tokenizer, sample)


def test_columns_of_rewards_are_checked_in_every_row_and_said(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "2 + 2", "answer": "4", "id": 1}, {"prompt": "3 + 4", "answer": None}, {"prompt": "5"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DatasetSection(path=str(path))
    with pytest.raises(UserError, match=r"a\.jsonl: row 3: .* 'gsm8k' needs column 'answer'; the row's columns are: prompt;"):
        prepare_prompts(section, DataSection(train=section), tokenizer, 99, {"answer": "reward function 'gsm8k'"})
    prompts = prepare_prompts(section, DataSection(train=section), tokenizer, 99).prompts
    assert describe_columns(section, prompts, {"answer"}) == (
        f"{path}: read as prompts: prompt; for rewards: answer; not used: id"
    )


def examples(tmp_path, rows, **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = PartFolder(tmp_path / "rows"), PartFolder(tmp_path / "rejected")
    section = PairsSection(path=str(path), **fields)
    ingest_dataset(section, *folders, rows_per_part=9, tokenizer=None, longest=None)
    return list(folders[0].rows())


def test_examples_of_presft_and_icl_are_read_alike(tmp_path):
    (row,) = examples(tmp_path, [{"instruction": "Add.", "input": "1", "output": "2"}])
    assert (row["prompt"], row["response"]) == ("Add.\n\n1", "2")
    for index, bad in enumerate(
        [
            {**ROW, "tools": TOOLS},
            {**ROW, "label": False},
            {**ROW, "input": "x"},
            {"prompt": "one two three", "completion": "one two three"},
        ]
    ):
        with pytest.raises(UserError, match="1 of 1 rows are unusable"):
            examples(tmp_path / str(index) if (tmp_path / str(index)).mkdir() is None else tmp_path, [bad])
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"no field completion \(1\); row 1 has prompt, response: name the columns with"):
        examples(tmp_path / "x", [{"prompt": "a", "response": "b"}])


def test_plans_of_presft_and_icl_name_columns_and_keys_that_are_not_used(tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [{**user("a"), "note": "x"}, {**assistant("b"), "name": "bot"}]
    path.write_text(json.dumps({"messages": turns, "id": 1, "model": "c"}) + "\n")
    assert describe_examples(PairsSection(path=str(path)), given_field="model") == (
        f"{path}: 1 of 1 rows, read as messages without their last answer: messages, completion, model; not used: id; "
        "message keys that are not used: name, note"
    )
    with pytest.raises(UserError, match="prompt: expected text, found a conversation"):
        describe_pool(ExamplesSection(path=str(path)))
    path.write_text(json.dumps({"prompt": "a"}) + "\n")
    with pytest.raises(UserError, match=r"no field completion \(1\); row 1 has prompt"):
        describe_examples(PairsSection(path=str(path)))


@pytest.mark.parametrize("label", ["False", "false"])
def test_labels_as_text_select_rows_like_labels(tmp_path, tokenizer, label):
    rows = [{"prompt": "q", "completion": "good", "label": "True"}, {"prompt": "q", "completion": "bad", "label": label}]
    dataset = supervised(tmp_path, rows, tokenizer)
    assert dataset.report.dropped == {"label is false": 1}
    assert len(dataset.samples) == 1
    assert "label: 0 or 1, a score or a class" in error_of(supervised, tmp_path, [rows[0] | {"label": "sports"}], tokenizer)


HH = {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: x", "rejected": "\n\nHuman: q\n\nAssistant: y"}
CHAT = [user("q"), assistant("a"), user("r"), assistant("x")]
PREFERENCES = {
    "transcripts": (HH, "messages_field=chosen"),
    "conversations": ({"chosen": CHAT, "rejected": [user("q"), assistant("y")]}, "messages_field=chosen"),
    "a prompt with conversations": ({"prompt": "q", "chosen": CHAT, "rejected": CHAT[:2]}, "messages_field=chosen"),
    "a prompt with answers": ({"prompt": "r", "chosen": "x", "rejected": "y"}, "completion_field=chosen"),
    "messages with answers": (
        {"prompt": [user("r")], "chosen": [assistant("x")], "rejected": [assistant("y")]},
        "completion_field=chosen",
    ),
    "a question": ({"question": "r", "chosen": "x", "rejected": "y"}, "prompt_field=question and completion_field=chosen"),
    "texts": ({"chosen": "wx", "rejected": "y"}, "text_field=chosen"),
}


@pytest.mark.parametrize("kind", PREFERENCES)
def test_sft_on_preferences_names_the_settings_by_which_it_learns_the_better_answer(tmp_path, tokenizer, kind):
    row, settings = PREFERENCES[kind]
    assert f"of which SFT learns the better answer with {settings}" in error_of(supervised, tmp_path, [row], tokenizer)
    fields = dict(one.split("=") for one in settings.split(" and "))
    (sample,) = supervised(tmp_path, [row], tokenizer, fields).samples
    answers = "a<|im_end|>\nx<|im_end|>\n" if "messages_field" in fields else "x<|im_end|>\n"
    assert learned(tokenizer, sample) == answers.removesuffix("\n" if kind == "texts" else "")
    assert "y" not in whole(tokenizer, sample).replace("system", "")


def first_prompt(tmp_path, row, tokenizer, *, chat=True, **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    section = DatasetSection(path=str(path), **fields)
    (prompt,) = prepare_prompts(section, DataSection(train=section, chat=chat), tokenizer, 999).prompts
    return tokenizer.decode(prompt.token_ids), describe_columns(section, [prompt], set())


@pytest.mark.parametrize("kind", ["transcripts", "conversations"])
def test_ppo_takes_the_conversation_before_the_last_answer_of_preferences_when_asked(tmp_path, tokenizer, kind):
    row, _ = PREFERENCES[kind]
    with pytest.raises(UserError, match=r"row 1: prompt: the row has no such field.*; prompt_field=chosen takes it without"):
        first_prompt(tmp_path, row, tokenizer)
    text, plan = first_prompt(tmp_path, row, tokenizer, prompt_field="chosen")
    turns = [f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in (("user", "q"), ("assistant", "a"), ("user", "r"))]
    assert text.endswith("".join([*turns, "<|im_start|>assistant\n"]))
    assert plan.endswith("read as chosen without its last answer: chosen; not used: rejected")


def test_a_transcript_stays_text_without_the_chat_template_and_ends_where_the_answer_begins(tmp_path, tokenizer):
    text, _ = first_prompt(tmp_path, HH, tokenizer, chat=False, prompt_field="chosen")
    assert text == HH["chosen"].removesuffix(" x")


def test_examples_take_the_last_answer_of_a_transcript(tmp_path):
    (row,) = examples(tmp_path, [HH], prompt_field="chosen")
    assert (row["prompt"], row["response"]) == ("r", "x")
    assert [turn["content"] for turn in json.loads(row["messages"])] == ["q", "a", "r"]
