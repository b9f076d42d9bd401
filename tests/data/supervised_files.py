"""Datasets for the tests of SFT and preference data: rows to a file, a file through the loaders, and a hard tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rayrlhf.config.data import PreferenceDataSection, SupervisedDataSection
from rayrlhf.data.supervised.datasets import PreferenceDataset, SupervisedDataset, load_preferences, load_supervised
from rayrlhf.errors import UserError
from rayrlhf.models.tiny import CHAT_TEMPLATE

MARKED_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}\n"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def supervised(folder: Path, rows: list[dict[str, Any]], tokenizer: Any, train: Any = None, **data: Any) -> SupervisedDataset:
    path = write_rows(folder, rows)
    section = SupervisedDataSection.model_validate({"train": {"path": str(path), **(train or {})}, **data})
    return load_supervised(section.train, section, tokenizer)


def preferences(folder: Path, rows: list[dict[str, Any]], tokenizer: Any, train: Any = None, **data: Any) -> PreferenceDataset:
    path = write_rows(folder, rows)
    section = PreferenceDataSection.model_validate({"train": {"path": str(path), **(train or {})}, **data})
    return load_preferences(section.train, section, tokenizer)


def error_of(load: Any, folder: Path, rows: list[dict[str, Any]], tokenizer: Any, train: Any = None, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, rows, tokenizer, train, **data)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message.replace(str(folder), "")) < 300
    return message.replace(f"{folder}/", "")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-pair tokenizer that merges over the border of prompt and answer, and puts a token before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["question: 4 + 42 =\n\nanswer: 46", "The sky is blue. The sky is green.\n\n", "assistant\n\nuser\n42 424242"] * 8
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}
