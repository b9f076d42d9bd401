"""Token ids and targets are those that TRL 1.16's trainers make of the same rows."""

import pytest

from rayrlhf.models.tiny import byte_tokenizer
from tests.data.supervised_files import (
    MARKED_TEMPLATE,
    assistant,
    merging_tokenizer,
    preferences,
    supervised,
    system,
    user,
)

TEXTS = [
    "The sky is blue.",
    "question: 4",
    "ends itself<|im_end|>",
    "naïve 🙂 é",
    " leading and trailing \n\n",
    "<|im_start|>odd",
]
COMPLETIONS = [" It is.", "2 + 42", "done<|im_end|>", "🙂", "\n\nanswer: 46", "4242"]
CONVERSATIONS = [
    [user("What is 4 + 42?"), assistant("46")],
    [system("Be brief. 🙂"), user("Hi"), assistant("\nHello"), user("And 42?"), assistant("4242 é")],
    [user("?"), assistant("The sky is blue.\n\n")],
]


@pytest.fixture(params=["bytes", "merging", "marked"])
def tokenizer(request):
    if request.param == "bytes":
        return byte_tokenizer()
    tokenizer = merging_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    if request.param == "marked":
        tokenizer.chat_template = MARKED_TEMPLATE
    return tokenizer


@pytest.fixture
def oracle(tmp_path):
    """TRL's preparation. The import takes seconds, so only these tests pay it."""
    import datasets

    from tests.data import trl_oracle

    datasets.disable_progress_bars()
    return trl_oracle


def as_trl(dataset):
    """Ids and labels; TRL's trainer never reads the first label."""
    return [
        (
            sample.token_ids.tolist(),
            [int(token) if learned else -100 for token, learned in zip(sample.token_ids, sample.loss_mask, strict=True)][1:],
        )
        for sample in dataset.samples
    ]


def without_first(prepared):
    return [(ids, labels[1:]) for ids, labels in prepared]


@pytest.mark.parametrize("max_length", [4096, 9])
def test_texts(oracle, tokenizer, tmp_path, max_length):
    rows = [{"text": text} for text in TEXTS]
    ours = supervised(tmp_path, rows, tokenizer, max_length=max_length, overlong="truncate")
    assert as_trl(ours) == without_first(oracle.prepare_supervised(rows, tokenizer, tmp_path, max_length=max_length))


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("max_length", [4096, 14])
def test_text_prompts_with_completions(oracle, tokenizer, tmp_path, loss_on, max_length):
    rows = [{"prompt": prompt, "completion": answer} for prompt in TEXTS for answer in COMPLETIONS]
    ours = supervised(tmp_path, rows, tokenizer, chat=False, loss_on=loss_on, max_length=max_length, overlong="truncate")
    theirs = oracle.prepare_supervised(
        rows, tokenizer, tmp_path, completion_only=loss_on == "completion", max_length=max_length
    )
    assert as_trl(ours) == without_first(theirs)
    assert ours.report.rows == ours.report.kept + sum(ours.report.dropped.values()) == len(rows)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_conversational_prompts_with_completions(oracle, tokenizer, tmp_path, loss_on):
    rows = [{"prompt": turns[:-1], "completion": turns[-1:]} for turns in CONVERSATIONS]
    ours = supervised(tmp_path, rows, tokenizer, loss_on=loss_on)
    theirs = oracle.prepare_supervised(rows, tokenizer, tmp_path, completion_only=loss_on == "completion")
    assert as_trl(ours) == without_first(theirs)


def test_whole_conversations(oracle, tokenizer, tmp_path):
    rows = [{"messages": turns} for turns in CONVERSATIONS]
    ours = supervised(tmp_path, rows, tokenizer, loss_on="all")
    assert as_trl(ours) == without_first(oracle.prepare_supervised(rows, tokenizer, tmp_path))


@pytest.mark.parametrize("max_length", [4096, 40])
def test_the_assistants_turns_of_a_marked_template(oracle, tmp_path, max_length):
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = MARKED_TEMPLATE
    rows = [{"messages": turns} for turns in CONVERSATIONS]
    ours = supervised(tmp_path, rows, tokenizer, max_length=max_length, overlong="truncate")
    theirs = oracle.prepare_supervised(rows, tokenizer, tmp_path, assistant_only=True, max_length=max_length)
    assert as_trl(ours) == without_first(theirs)


def test_the_assistants_turns_of_a_completion(oracle, tmp_path):
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = MARKED_TEMPLATE
    rows = [{"prompt": CONVERSATIONS[1][:2], "completion": CONVERSATIONS[1][2:]}]
    ours = supervised(tmp_path, rows, tokenizer, loss_on="assistant")
    theirs = oracle.prepare_supervised(rows, tokenizer, tmp_path, assistant_only=True, completion_only=True)
    assert as_trl(ours) == without_first(theirs)
    assert not ours.samples[0].loss_mask.all()


@pytest.mark.parametrize("max_length", [4096, 14])
@pytest.mark.parametrize("prompt", ["explicit", "implicit"])
def test_text_pairs(oracle, tokenizer, tmp_path, prompt, max_length):
    rows = [{"prompt": text, "chosen": COMPLETIONS[0], "rejected": answer} for text in TEXTS for answer in COMPLETIONS[1:]]
    if prompt == "implicit":
        rows = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in rows]
    ours = preferences(tmp_path, rows, tokenizer, chat=False, max_length=max_length, overlong="drop")
    theirs = oracle.prepare_pairs(rows, tokenizer, tmp_path, max_length=max_length)
    assert [(pair.chosen.token_ids.tolist(), pair.rejected.token_ids.tolist()) for pair in ours.samples] == theirs
    assert theirs


@pytest.mark.parametrize("prompt", ["explicit", "implicit"])
def test_conversational_pairs(oracle, tokenizer, tmp_path, prompt):
    rows = [{"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [assistant("No 4242")]} for turns in CONVERSATIONS]
    if prompt == "implicit":
        rows = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in rows]
    ours = preferences(tmp_path, rows, tokenizer)
    theirs = oracle.prepare_pairs(rows, tokenizer, tmp_path)
    assert [(pair.chosen.token_ids.tolist(), pair.rejected.token_ids.tolist()) for pair in ours.samples] == theirs
