"""`rayrlhf chat` shows the model's answer, and names an empty one."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayrlhf.config.model import ModelSection
from rayrlhf.errors import UserError
from rayrlhf.models.builtin import resolve_model
from rayrlhf.models.load import load_tokenizer
from rayrlhf.ppo import chat
from rayrlhf.ppo.chat import chat_with
from tests.models.families import write_family


@pytest.mark.parametrize("empty", [True, False])
def test_an_empty_answer_is_named(monkeypatch, capsys, empty):
    folder = resolve_model("builtin:tiny?layers=1&hidden=64&context=64")
    model = AutoModelForCausalLM.from_pretrained(folder)

    def generate(*, input_ids, streamer, **settings):
        token = model.config.eos_token_id if empty else 68
        return torch.cat([input_ids, torch.tensor([[token]])], dim=1)

    monkeypatch.setattr("rayrlhf.models.load.load_causal_model", lambda section: model)
    monkeypatch.setattr(model, "generate", generate)
    chat_with(Path(folder), "hi", max_new_tokens=4, temperature=0.0)
    assert ("(an empty answer: the model ended it without text)" in capsys.readouterr().out) == empty


@pytest.fixture
def folder(tmp_path):
    """A model that has eager attention only."""
    return write_family("gpt_neo", tmp_path / "run" / "export")


def test_a_model_without_sdpa_answers(folder, capsys):
    chat_with(folder, "hi", max_new_tokens=2, temperature=0.0)
    assert capsys.readouterr().out


def test_prompts_are_plain_text_where_those_of_the_run_were(folder, monkeypatch, capsys):
    read = []
    tokenizer = load_tokenizer(ModelSection(path=str(folder)))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no chat template"):
        chat_with(folder.parent, "hi", max_new_tokens=2, temperature=0.0)
    (folder.parent / "config.yaml").write_text("data: {chat: false}\nmodel: {path: x, trust_remote_code: true}\n")
    load = chat.ModelSection
    monkeypatch.setattr(chat, "ModelSection", lambda **settings: read.append(settings) or load(**settings))
    chat_with(folder.parent, "hi", max_new_tokens=2, temperature=0.0)
    assert read[0]["trust_remote_code"]


def test_a_token_that_the_model_does_not_have_is_one_line(folder):
    tokenizer = load_tokenizer(ModelSection(path=str(folder)))
    tokenizer.add_tokens([f"<new{number}>" for number in range(9)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"its tokenizer writes '<new8>' as token 267, expected at most 263"):
        chat_with(folder, "<new8>", max_new_tokens=2, temperature=0.0)
