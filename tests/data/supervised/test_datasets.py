"""What is learned, what is left out and counted, and that every bad row is named in one line before any model loads."""

import json
import logging
import pickle

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rayrlhf.config.data import PreferenceDataSection, SupervisedDataSection
from rayrlhf.data.supervised.datasets import (
    encode_batch,
    encode_preference_batch,
    load_preference_data,
    load_preferences,
    load_supervised_data,
    preference_recipe,
    supervised_recipe,
)
from rayrlhf.errors import UserError
from rayrlhf.models.tiny import byte_tokenizer
from tests.data.hub_folder import write_hub_folder
from tests.data.supervised_files import (
    assistant,
    error_of,
    merging_tokenizer,
    preferences,
    supervised,
    system,
    user,
    write_rows,
)

PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}


def learned(tokenizer, sample):
    return tokenizer.decode(sample.token_ids[sample.loss_mask])


def test_a_text_prompt_becomes_a_user_turn_and_only_its_answer_is_learned(tmp_path, tokenizer):
    rows = [{"question": "2 + 2?", "answer": "4", "id": 7}]
    train = {"prompt_field": "question", "completion_field": "answer", "template": "Sum: {prompt}"}
    (sample,) = supervised(tmp_path, rows, tokenizer, train, system_prompt="Be brief.").samples
    assert tokenizer.decode(sample.token_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSum: 2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    )
    assert learned(tokenizer, sample) == "4<|im_end|>\n"
    assert (sample.token_ids.dtype, sample.loss_mask.dtype) == (np.int32, np.bool_)


def test_tokens_are_learned_as_they_are_unless_there_are_words(tmp_path, tokenizer):
    (sample,) = supervised(tmp_path, [{"input_ids": [5, 6, 7], "documents": [1]}], tokenizer).samples
    assert (sample.token_ids.tolist(), sample.loss_mask.tolist()) == ([5, 6, 7], [False, True, True])
    assert (sample.token_ids.dtype, sample.loss_mask.dtype) == (np.int32, np.bool_)
    (sample,) = supervised(tmp_path, [{"ids": [5, 6], "text": "a"}], tokenizer, {"tokens_field": "ids"}).samples
    assert tokenizer.decode(sample.token_ids).startswith("a")
    (sample,) = supervised(
        tmp_path, [{"ids": [5, 6], "text": "a"}], tokenizer, {"tokens_field": "ids", "format": "tokens"}
    ).samples
    assert sample.token_ids.tolist() == [5, 6]


def test_a_built_in_dataset_brings_its_prompt_column(tokenizer):
    section = SupervisedDataSection.model_validate(
        {"train": {"path": "builtin:word-problems?count=20", "completion_field": "solution"}, "evaluation_share": 0.2}
    )
    train, evaluation = load_supervised_data(section, tokenizer)
    assert len(train.samples) + len(evaluation.samples) == 20
    assert "Answer:" in learned(tokenizer, evaluation.samples[0])


def test_every_turn_of_the_assistant_is_learned_and_nothing_else(tmp_path, tokenizer):
    rows = [{"messages": [system("S"), user("a"), assistant("one"), user("b"), assistant("two")]}]
    (sample,) = supervised(tmp_path, rows, tokenizer).samples
    assert learned(tokenizer, sample) == "one<|im_end|>\ntwo<|im_end|>\n"
    (whole,) = supervised(tmp_path, rows, tokenizer, loss_on="all").samples
    assert np.array_equal(whole.token_ids, sample.token_ids)
    assert whole.loss_mask.tolist() == [False] + [True] * (len(whole.token_ids) - 1)


def test_one_turn_is_learned_alike_as_a_conversation_and_as_a_completion(tmp_path, tokenizer):
    (one,) = supervised(tmp_path, [{"messages": [user("Hi"), assistant("Hello")]}], tokenizer).samples
    (two,) = supervised(tmp_path, [{"prompt": "Hi", "completion": "Hello"}], tokenizer).samples
    assert np.array_equal(one.token_ids, two.token_ids)
    assert np.array_equal(one.loss_mask, two.loss_mask)


def test_an_answer_that_merges_with_its_turns_opening_is_learned_from_the_token_across_the_border(tmp_path):
    tokenizer = merging_tokenizer()
    dataset = supervised(tmp_path, [{"messages": [user("a"), assistant("\nb")]}], tokenizer)
    (sample,) = dataset.samples
    assert dataset.report.rewritten == 1
    assert learned(tokenizer, sample) == "t\n\nb<|im_end|>\n"


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_all_is_learned(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}{{ m.role + ':' + m.content + ';' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    two_turns = [{"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}]
    message = error_of(supervised, tmp_path, two_turns, tokenizer)
    assert message.startswith("rows.jsonl: row 1: message 2: the chat template renders it differently once others follow")
    assert "{% generation %}" in message
    assert supervised(tmp_path, two_turns, tokenizer, loss_on="all").report.kept == 1
    (sample,) = supervised(tmp_path, [{"messages": [user("a"), assistant("b")]}], tokenizer).samples
    assert learned(tokenizer, sample) == "b;"


def test_pairs_carry_their_margin_and_mark_the_answers(tmp_path, tokenizer):
    rows = [{**PAIR, "margin": 1}, {"prompt": "x", "chosen": "long answer", "rejected": "no", "margin": 0.5}]
    first, second = preferences(tmp_path, rows, tokenizer).samples
    assert (first.margin, second.margin, second.row) == (1.0, 0.5, 2)
    assert [learned(tokenizer, part) for part in (second.chosen, second.rejected)] == [
        "long answer<|im_end|>\n",
        "no<|im_end|>\n",
    ]
    assert preferences(tmp_path, [PAIR], tokenizer).samples[0].margin is None


def test_the_prompt_of_an_implicit_pair_is_what_both_begin_with(tmp_path, tokenizer):
    rows = [{"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}]
    (pair,) = preferences(tmp_path, rows, tokenizer).samples
    assert [learned(tokenizer, part) for part in (pair.chosen, pair.rejected)] == ["yes<|im_end|>\n", "no<|im_end|>\n"]
    (pair,) = preferences(tmp_path, rows, tokenizer, chat=False).samples
    assert [learned(tokenizer, part) for part in (pair.chosen, pair.rejected)] == ["yes<|im_end|>", "no<|im_end|>"]
    turns = [user("q"), assistant("a"), user("r")]
    rows = [{"prompt": "q", "chosen": [*turns, assistant("x")], "rejected": [*turns, assistant("y")]}]
    (pair,) = preferences(tmp_path, rows, tokenizer, system_prompt="S").samples
    assert [learned(tokenizer, part) for part in (pair.chosen, pair.rejected)] == ["x<|im_end|>\n", "y<|im_end|>\n"]
    assert tokenizer.decode(pair.chosen.token_ids).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq")


def test_a_cut_sample_keeps_its_start_and_a_cut_pair_its_end(tmp_path, tokenizer):
    (sample,) = supervised(tmp_path, [{"text": "abcdefgh"}], tokenizer, max_length=4, overlong="truncate").samples
    assert tokenizer.decode(sample.token_ids) == "abcd"
    rows = [{"prompt": "a", "chosen": "bcdefgh", "rejected": "x"}]
    dataset = preferences(tmp_path, rows, tokenizer, chat=False, max_length=4, overlong="truncate")
    assert tokenizer.decode(dataset.samples[0].chosen.token_ids) == "fgh<|im_end|>"
    assert dataset.samples[0].chosen.loss_mask.tolist() == [False, True, True, True]
    assert (dataset.report.truncated, dataset.report.dropped) == (1, {})


def test_what_cutting_leaves_without_a_use_is_dropped_and_counted(tmp_path, tokenizer, caplog):
    rows = [{"prompt": "p" * 9, "completion": "c"}, {"prompt": "p", "completion": "c"}]
    with caplog.at_level(logging.WARNING):
        report = supervised(tmp_path, rows, tokenizer, chat=False, max_length=9, overlong="truncate").report
    assert (report.rows, report.kept, report.truncated) == (2, 1, 0)
    assert report.dropped == {"no token to learn within data.max_length": 1}
    assert f"{tmp_path}/rows.jsonl: 1 dropped: no token to learn within data.max_length" in caplog.text
    rows = [{"chosen": "a same", "rejected": "b same"}, {"chosen": "ab", "rejected": "ac"}]
    report = preferences(tmp_path, rows, tokenizer, max_length=5, overlong="truncate").report
    assert (report.kept, report.dropped) == (1, {"chosen equal to rejected within data.max_length": 1})


def test_long_rows_are_an_error_unless_said_otherwise(tmp_path, tokenizer):
    rows = [{"text": "short"}, {"text": "long" * 9}]
    assert error_of(supervised, tmp_path, rows, tokenizer, max_length=16) == (
        "rows.jsonl: row 2: 37 tokens, expected at most 16; "
        "set data.overlong to truncate or drop, or allow more with data.max_length"
    )
    dropped = supervised(tmp_path, rows, tokenizer, max_length=16, overlong="drop").report
    assert (dropped.kept, dropped.dropped) == (1, {"longer than data.max_length": 1})
    pairs = [PAIR, {**PAIR, "rejected": "5" * 99}]
    assert "row 2: " in error_of(preferences, tmp_path, pairs, tokenizer, max_length=60)
    assert preferences(tmp_path, pairs, tokenizer, max_length=60, overlong="drop").report.kept == 1


def test_the_report_says_all_that_happened(tmp_path, tokenizer):
    rows = [{"text": "abc"}, {"text": " "}, {"text": "abcdefgh"}]
    report = supervised(tmp_path, rows, tokenizer, max_length=5, overlong="truncate", invalid="drop").report
    source = f"{tmp_path}/rows.jsonl"
    assert report.lines() == [
        f"{source}: 2 of 3 rows, 9 tokens, 7 of them targets (78 %)",
        f"{source}: read as texts: text",
        f"{source}: 1 cut to data.max_length",
        f"{source}: 1 without an end-of-sequence target, which do not teach to stop",
        f"{source}: 1 dropped: empty answer",
    ]


def test_prompts_that_read_differently_alone_are_counted(tmp_path):
    tokenizer = merging_tokenizer()
    rows = [{"prompt": "question: 4", "completion": "2 + 42"}, {"prompt": "a\n", "completion": "b"}]
    dataset = supervised(tmp_path, rows, tokenizer, chat=False)
    assert dataset.report.rewritten == 1
    assert "1 whose prompt has other tokens alone" in dataset.report.changes()[0]
    assert learned(tokenizer, dataset.samples[0]) == "ion: 42 + 42<|im_end|>"
    assert learned(tokenizer, dataset.samples[1]) == "b<|im_end|>"


def test_samples_that_do_not_teach_to_stop_are_counted(tmp_path, tokenizer):
    rows = [{"messages": [user("a"), assistant("b")]}]
    assert supervised(tmp_path, rows, tokenizer).report.endless == 0
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}"
    rows = [{"prompt": [user("a")], "completion": [assistant("b")]}]
    report = supervised(tmp_path, rows, tokenizer).report
    assert report.endless == 1
    assert "1 without an end-of-sequence target, which do not teach to stop" in report.lines()[-1]
    assert supervised(tmp_path, [{"text": "abcdefgh"}], tokenizer, max_length=4, overlong="truncate").report.endless == 1


def test_pairs_that_only_the_tokenizer_makes_equal_are_refused(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | trim }};{% endfor %}"
    rows = [PAIR, {**PAIR, "rejected": "4 "}]
    assert "row 2: chosen and rejected have the same tokens" in error_of(preferences, tmp_path, rows, tokenizer)
    assert preferences(tmp_path, rows, tokenizer, invalid="drop").report.dropped == {"chosen equal to rejected": 1}


def test_invalid_rows_are_dropped_by_reason_but_wrong_formats_never(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}, {"prompt": " ", "completion": "b"}]
    report = supervised(tmp_path, rows, tokenizer, invalid="drop").report
    assert (report.kept, report.dropped) == (1, {"empty answer": 1, "empty prompt": 1})
    assert "row 2" in error_of(supervised, tmp_path, [rows[0], {"prompt": 3, "completion": "b"}], tokenizer, invalid="drop")
    assert (
        error_of(supervised, tmp_path, rows[1:2], tokenizer, invalid="drop")
        == "rows.jsonl: all 1 rows were dropped: 1 empty answer"
    )


def test_a_tokenizer_needs_no_pad_token_but_an_end_or_a_template(tmp_path, tokenizer):
    tokenizer.pad_token = None
    text, prompt = [{"text": "a"}], [{"prompt": "a", "completion": "b"}]
    assert supervised(tmp_path, text, tokenizer).report.kept == 1
    assert preferences(tmp_path, [PAIR], tokenizer).report.kept == 1
    tokenizer.chat_template = None
    assert "has no chat template; set model.chat_template to a Jinja file, or data.chat to false" in error_of(
        supervised, tmp_path, prompt, tokenizer
    )
    assert supervised(tmp_path, prompt, tokenizer, chat=False).report.kept == 1
    tokenizer.eos_token = None
    assert "has no end-of-sequence token to append to plain text" in error_of(supervised, tmp_path, text, tokenizer)


def test_batches_encode_alike_in_any_cut_and_in_another_process(tmp_path, tokenizer):
    rows = [{"prompt": f"{number} + 1?", "completion": str(number + 1)} for number in range(7)]
    section = SupervisedDataSection.model_validate({"train": {"path": "f"}})
    recipe = supervised_recipe(rows[0], 1, section.train, section, tokenizer)
    whole, report = encode_batch(rows, range(1, 8), recipe, tokenizer)
    recipe, tokenizer = pickle.loads(pickle.dumps((recipe, tokenizer)))
    parts = [encode_batch(rows[cut], range(1, 8)[cut], recipe, tokenizer) for cut in (slice(3), slice(3, 7))]
    joined = parts[0][0] + parts[1][0]
    assert [sample.row for sample in joined] == [1, 2, 3, 4, 5, 6, 7]
    assert all(np.array_equal(one.token_ids, two.token_ids) for one, two in zip(whole, joined, strict=True))
    assert parts[0][1] + parts[1][1] == report
    assert encode_batch([], [], recipe, tokenizer)[0] == []
    pairs = PreferenceDataSection.model_validate({"train": {"path": "f"}})
    pair_recipe = pickle.loads(pickle.dumps(preference_recipe(PAIR, 1, pairs.train, pairs, tokenizer)))
    assert encode_preference_batch([PAIR], [1], pair_recipe, tokenizer)[1].kept == 1


def test_groups_stay_on_one_side_and_both_stages_hold_out_the_same(tmp_path, tokenizer):
    pairs = [{"q": f"question {n}", "chosen": f"yes {i}", "rejected": "no"} for n in range(40) for i in range(1 + n % 3)]
    texts = [{"q": f"question {n}", "a": "yes"} for n in reversed(range(40))]
    path = write_rows(tmp_path, pairs)
    section = PreferenceDataSection.model_validate(
        {"train": {"path": str(path), "prompt_field": "q", "group_field": "q"}, "evaluation_share": 0.3}
    )
    train, held = load_preference_data(section, tokenizer)
    assert not set(train.groups) & set(held.groups)
    assert 4 <= len(set(held.groups)) <= 20
    assert train.report.held_out == len(held.samples) == held.report.kept
    assert train.report.kept + train.report.held_out == train.report.rows == len(pairs)
    assert [pairs[pair.row - 1]["q"] for pair in held.samples] == held.groups
    other = tmp_path / "texts.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in texts))
    columns = {"path": str(other), "prompt_field": "q", "completion_field": "a", "group_field": "q"}
    supervised_section = SupervisedDataSection.model_validate({"train": columns, "evaluation_share": 0.3})
    assert set(load_supervised_data(supervised_section, tokenizer)[1].groups) == set(held.groups)


def test_held_out_rows_come_from_one_place(tmp_path, tokenizer):
    path = str(write_rows(tmp_path, [{"text": "a"}, {"text": "b"}, {"text": "c"}]))
    section = SupervisedDataSection.model_validate({"train": {"path": path}, "evaluation": {"path": path, "limit": 1}})
    train, held = load_supervised_data(section, tokenizer)
    assert (len(train.samples), len(held.samples)) == (3, 1)
    assert load_supervised_data(SupervisedDataSection.model_validate({"train": {"path": path}}), tokenizer)[1] is None
    alone = SupervisedDataSection.model_validate({"train": {"path": path, "limit": 1}, "evaluation_share": 0.5})
    with pytest.raises(UserError, match=r"evaluation_share 0.5: expected rows of at least two groups, found 1"):
        load_supervised_data(alone, tokenizer)


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=12)
answers = texts.filter(str.strip)
opened = st.just([]) | texts.map(lambda text: [system(text)])


@given(opened, st.lists(st.tuples(answers, answers), min_size=1, max_size=4))
def test_what_is_learned_is_what_the_assistant_wrote_whatever_it_is(tmp_path_factory, opening, turns):
    tokenizer = byte_tokenizer()
    messages = opening + [message for said, answer in turns for message in (user(said), assistant(answer))]
    (sample,) = supervised(tmp_path_factory.mktemp("rows"), [{"messages": messages}], tokenizer, max_length=4096).samples
    assert learned(tokenizer, sample) == "".join(f"{answer}<|im_end|>\n" for _, answer in turns)


@given(texts.filter(str.strip), answers, answers)
def test_a_pairs_answers_are_marked_whatever_they_are(tmp_path_factory, prompt, chosen, rejected):
    tokenizer = byte_tokenizer()
    assume(chosen != rejected and not chosen.lstrip().startswith(prompt.strip()))
    assume(not rejected.lstrip().startswith(prompt.strip()))
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]
    (pair,) = preferences(tmp_path_factory.mktemp("rows"), rows, tokenizer, max_length=4096).samples
    assert [learned(tokenizer, part) for part in (pair.chosen, pair.rejected)] == [
        f"{answer}<|im_end|>\n" for answer in (chosen, rejected)
    ]


def test_parquet_files_give_what_lines_of_json_give(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": "q", "chosen": [user("q"), assistant(f"{n}")], "rejected": [user("q"), assistant("no")], "margin": n}
            for n in range(3)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    section = PreferenceDataSection.model_validate({"train": {"path": str(tmp_path / "rows.parquet")}})
    from_parquet = load_preferences(section.train, section, tokenizer).samples
    from_lines = preferences(tmp_path, rows, tokenizer).samples
    for one, two in zip(from_parquet, from_lines, strict=True):
        assert np.array_equal(one.chosen.token_ids, two.chosen.token_ids)
        assert (one.margin, one.row) == (two.margin, two.row)
    mixed = [{"text": "a"}, {"messages": [user("q"), assistant("a")]}]
    pq.write_table(pa.Table.from_pylist(mixed), tmp_path / "rows.parquet")
    mixed_section = SupervisedDataSection.model_validate({"train": {"path": str(tmp_path / "rows.parquet")}})
    with pytest.raises(UserError, match=r"rows.parquet: row 2: text: missing or null, expected as in the first row \(text\)"):
        load_supervised_data(mixed_section, tokenizer)


def test_a_hub_dataset_gives_what_lines_of_json_give(tmp_path, tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": [user(f"q{n}")], "completion": [assistant(f"{n}")]} for n in range(5)]
    folder = write_hub_folder(tmp_path / "some" / "set", rows)
    hub = SupervisedDataSection.model_validate({"train": {"path": str(folder), "subset": "main"}})
    (found, _), expected = load_supervised_data(hub, tokenizer), supervised(tmp_path, rows, tokenizer)
    assert [sample.row for sample in found.samples] == [sample.row for sample in expected.samples] == [1, 2, 3, 4, 5]
    for one, two in zip(found.samples, expected.samples, strict=True):
        assert np.array_equal(one.token_ids, two.token_ids)
        assert np.array_equal(one.loss_mask, two.loss_mask)
    bad = write_hub_folder(tmp_path / "some" / "bad", [*rows, {"prompt": [user("q")], "completion": []}])
    hub = SupervisedDataSection.model_validate({"train": {"path": str(bad), "subset": "main"}})
    with pytest.raises(UserError, match=r"some/bad: row 6: completion: "):
        load_supervised_data(hub, tokenizer)


def test_the_built_in_pairs_make_a_reward_models_data(tokenizer):
    section = PreferenceDataSection.model_validate({"train": {"path": "builtin:sum-pairs?count=30"}})
    train, held = load_preference_data(section, tokenizer)
    assert len(train.samples) + len(held.samples) == 30
