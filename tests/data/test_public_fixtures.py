"""Rows in the form of public projects' fixtures, with content of our own: read whole, or refused with the reason."""

import json

import pytest

from rayrlhf.errors import UserError
from rayrlhf.tools.data_view import data_lines, masked_text, show_data

HI, BYE = "Hi", "Hello."
CONFIGS = {
    "sft": "data: {train: {path: none}, evaluation: {path: none}, max_length: 256}",
    "dpo": "data: {train: {path: none}, evaluation: {path: none}, max_length: 256}",
    "ppo": """data: {train: {path: none}}
rollout: {max_new_tokens: 8}
reward: {functions: [{name: "REWARD"}]}
evaluation: {enabled: false}""",
}
HEAD = "run: {name: shown}\nmodel: {path: 'builtin:tiny?context=256', dtype: float32}\n"


def talk(*turns, role="from", text="value"):
    return [{role: one, text: words} for one, words in turns]


def chat(*turns):
    return talk(*turns, role="role", text="content")


CALL = json.dumps({"name": "area", "arguments": {"sides": [5, 3]}})
TOOL = json.dumps([{"name": "area", "description": "Area", "parameters": {"type": "object", "properties": {}}}])
PAIR = {
    "conversations": talk(("system", "Be kind."), ("human", HI)),
    "chosen": {"from": "gpt", "value": BYE},
    "rejected": {"from": "gpt", "value": "Go."},
}
READ = {
    "xtuner, chat with an id": (
        "sft",
        {"id": 0, "messages": chat(("user", HI), ("assistant", BYE))},
        ("read as conversations: messages; not used: id", "⟦Hello.<|im_end|>"),
    ),
    "LLaMA-Factory, KTO chat": (
        "sft",
        {"messages": chat(("user", HI), ("assistant", BYE)), "label": True},
        ("read as conversations, of which those with label true are kept: label, messages", "⟦Hello.<|im_end|>"),
    ),
    "LLaMA-Factory, no tools": (
        "sft",
        {"conversations": talk(("human", HI), ("gpt", BYE)), "tools": "[]"},
        ("read as ShareGPT conversations", "⟦Hello.<|im_end|>"),
    ),
    "LLaMA-Factory, pair with answers as messages": (
        "dpo",
        PAIR,
        ("read as pairs with conversations: chosen, conversations, rejected", "system\nBe kind.", "⟦Hello.", "⟦Go."),
    ),
    "LLaMA-Factory, prompts of pairs": (
        "ppo",
        {**PAIR, "reward_model": "2"},
        ("conversations without their last answer", "Be kind.", "Hi<|im_end|>"),
    ),
    "FastChat, ShareGPT with system": (
        "sft",
        {
            "id": "identity_0",
            "system": "Be kind.",
            "conversations": talk(("human", HI), ("gpt", BYE), ("human", "Bye"), ("gpt", "Bye.")),
        },
        ("system\nBe kind.", "⟦Hello.<|im_end|>", "⟦Bye.<|im_end|>", "not used: id"),
    ),
    "axolotl, tokens": (
        "sft",
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
        ("read as tokens: attention_mask, input_ids, labels", "2 of them targets"),
    ),
    "NeMo-Aligner, scores of a text": (
        "sft",
        {"text": "User: Hi. Assistant: Hello.", "label": [-100.0, 4.0]},
        ("read as texts: text; not used: label",),
    ),
    "Open Assistant, one message a row": (
        "sft",
        {"message_id": "1", "parent_id": None, "text": HI, "role": "prompter"},
        ("read as texts: text; not used: message_id, role",),
    ),
    "verl, chat prompt": (
        "ppo",
        {"data_source": "made", "prompt": chat(("user", "1 + 1?")), "reward_model": {"ground_truth": "2", "style": "rule"}},
        ("read as prompts: prompt; for rewards: reward_model; not used: data_source", "1 + 1?<|im_end|>"),
    ),
}
REFUSED = {
    "axolotl, empty turn": (
        "sft",
        {"conversations": talk(("human", HI), ("gpt", ""), ("human", "Please."), ("gpt", BYE))},
        "message 2: the assistant's content is empty",
    ),
    "NeMo-Aligner, pair": (
        "dpo",
        {"prompt": HI, "chosen_response": BYE, "rejected_response": "Go."},
        "found prompt, chosen_response, rejected_response; name them with chosen_field, rejected_field",
    ),
    "NeMo-Aligner, roles with capitals": (
        "sft",
        {"system": "", "mask": "User", "conversations": talk(("User", HI), ("Assistant", BYE))},
        "unknown role 'User'; did you mean user?",
    ),
    "xtuner, image": (
        "sft",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}}]},
                *chat(("assistant", BYE)),
            ]
        },
        "a part of type image_url: not supported",
    ),
    "LLaMA-Factory, pair for SFT": (
        "sft",
        PAIR,
        "SFT learns the better answer with prompt_field=conversations and completion_field=chosen",
    ),
    "LLaMA-Factory, answer labeled false": (
        "sft",
        {"messages": chat(("user", HI), ("assistant", "Go.")), "label": False},
        "all 1 rows were dropped: 1 label is false",
    ),
    "LLaMA-Factory, tools without a template for them": (
        "sft",
        {"conversations": talk(("human", HI), ("function_call", CALL), ("observation", "15"), ("gpt", "15")), "tools": TOOL},
        "the chat template does not write it",
    ),
    "ms-swift, query and history": (
        "sft",
        {"system": "Be kind.", "query": HI, "response": BYE, "history": [["A?", "B."]]},
        "found system, query, response, history; name them with",
    ),
    "LMFlow, text2text": (
        "sft",
        {"type": "text2text", "instances": [{"input": HI, "output": BYE}]},
        "found type, instances; name them with",
    ),
    "Dolly, context": (
        "sft",
        {"instruction": "Name it.", "context": "It barks.", "response": "Dog", "category": "closed_qa"},
        "found instruction, context, response, category; name them with",
    ),
    "SHP, two references": (
        "dpo",
        {"history": HI, "human_ref_A": BYE, "human_ref_B": "Go.", "labels": 1},
        "found history, human_ref_A",
    ),
}


@pytest.fixture
def lines_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.py").write_text("def score(responses, reward_model):\n    return [0.0] * len(responses)\n")

    def read(task, row, *settings):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        (tmp_path / "config.yaml").write_text(HEAD + CONFIGS[task].replace("REWARD", "reward.py:score"))
        paths = ["data.train.path=rows.jsonl", *([] if task == "ppo" else ["data.evaluation.path=rows.jsonl"])]
        lines = data_lines(tmp_path / "config.yaml", [*paths, *settings], task, 1, color=False)
        return "\n".join(line.plain for line in lines)

    return read


@pytest.mark.parametrize("name", READ)
def test_a_fixture_is_read_whole_and_its_columns_are_named(name, lines_of):
    task, row, expected = READ[name]
    shown = lines_of(task, row)
    for words in expected:
        assert words in shown


@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_sft_learns_the_better_answer_of_a_pair_with_the_settings_that_its_refusal_names(column, lines_of):
    row = {column: PAIR["conversations"], "chosen": PAIR["chosen"], "rejected": PAIR["rejected"]}
    settings = (f"prompt_field={column}", "completion_field=chosen")
    with pytest.raises(UserError, match=f"with {' and '.join(settings)}$"):
        lines_of("sft", row)
    places = [f"data.{part}.{setting}" for part in ("train", "evaluation") for setting in settings]
    shown = lines_of("sft", row, *places)
    read = f"read as {column} with answers: chosen, {column}; not used: rejected"
    assert all(words in shown for words in (read, "system\nBe kind.", "⟦Hello.<|im_end|>")), shown


@pytest.mark.parametrize("name", REFUSED)
def test_a_fixture_that_cannot_be_read_is_refused_with_the_reason(name, lines_of):
    task, row, expected = REFUSED[name]
    with pytest.raises(UserError, match=r"rows\.jsonl") as caught:
        lines_of(task, row)
    assert expected in str(caught.value)


def test_the_page_has_the_tokens_of_the_loss_in_another_color(tmp_path, lines_of, capsys):
    lines_of("sft", {"prompt": HI, "completion": BYE})
    show_data(
        tmp_path / "config.yaml",
        ["data.train.path=rows.jsonl", "data.evaluation.path=rows.jsonl"],
        "sft",
        1,
        tmp_path / "p.html",
    )
    page = (tmp_path / "p.html").read_text()
    assert "pre-wrap" in page
    (colored,) = [part for part in page.split("<span") if "Hello." in part]
    assert "font-weight: bold" in colored
    assert HI not in colored
    assert BYE in capsys.readouterr().out


def test_prompts_are_read_once_and_no_weights(lines_of, monkeypatch):
    from rayrlhf.data import prompt_datasets

    read, original = [], prompt_datasets.read_rows
    monkeypatch.setattr(prompt_datasets, "read_rows", lambda section: read.append(section) or original(section))
    monkeypatch.setattr("rayrlhf.models.network.build_network", None)
    assert "prompts: 1 to train on, 0 held out" in lines_of(*READ["verl, chat prompt"][:2])
    assert len(read) == 1


def test_an_unknown_task_is_refused(tmp_path):
    with pytest.raises(UserError, match="--task pp: expected one of sft, dpo, reward, ppo, evaluate"):
        data_lines(tmp_path / "none.yaml", [], "pp", 1, color=False)


@pytest.mark.parametrize("mask", [[True, True, False], [False, False, True], [False, True, False]])
def test_brackets_hold_the_tokens_of_the_loss(mask, tokenizer):
    import numpy as np

    ids = np.array(tokenizer("abc", add_special_tokens=False)["input_ids"], dtype=np.int32)
    shown = masked_text(tokenizer, ids, np.array(mask), color=False).plain
    inside = "".join(part.split("⟧")[0] for part in shown.split("⟦")[1:])
    assert inside == "".join(letter for letter, learned in zip("abc", mask, strict=True) if learned)
