"""What the sampler reads before a prompt: others' questions with their answers, never the prompt's own, as much as fits."""

import logging

import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.words import normalized
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_tokenizer
from rayrlhf.ppo.rollout_collector import make_requests
from rayrlhf.ppo.run_prompts import load_prompts
from tests.tuning.runs import write_rows

ROWS = [{"prompt": f"what is {number} plus one", "completion": f"<{number + 1}>"} for number in range(12)]
# The text of a row once more, under another number: it must not be shown beside its twin either.
ROWS.append({"prompt": "What is 3 plus  one", "completion": "<4>"})


def config(folder, *overrides, rows=ROWS):
    path = write_rows(folder / "rows.jsonl", rows)
    own = [
        "model.path=builtin:tiny?layers=1&hidden=64&context=256",
        "rollout.backend=transformers",
        "rollout.demonstrations={count: 3}",
        "rollout.max_new_tokens=8",
        "reward.functions=[{name: tests.ppo.runs:digit_share}]",
        f"data.train.path={path}",
        f"data.evaluation.path={path}",
    ]
    return load_config(PPOConfig, None, [*own, *overrides])


def read(settings, token_ids):
    return load_tokenizer(settings.model).decode(token_ids)


@pytest.mark.parametrize("selection", ["random", "bm25"])
@pytest.mark.parametrize("train_with", ["with_demonstrations", "without_demonstrations"])
def test_every_prompt_stands_behind_others_with_their_answers_and_never_behind_its_own_text(tmp_path, selection, train_with):
    shown = f"rollout.demonstrations={{count: 3, selection: {selection}, train_with: {train_with}}}"
    settings = config(tmp_path, shown)
    train, held_out = load_prompts(settings)
    plain, _ = load_prompts(config(tmp_path, "rollout.demonstrations=null"))
    for row, prompt, bare in zip(ROWS, train, plain, strict=True):
        seen = read(settings, prompt.token_ids if train_with == "with_demonstrations" else prompt.context_ids)
        assert sum(other["completion"] in seen for other in ROWS[:12]) == 3
        assert row["completion"] not in seen
        assert normalized(seen).count(normalized(row["prompt"])) == 1
        assert prompt.text == bare.text
        # What is asked of a replica is what was seen; what is trained on has the same end, the question.
        assert read(settings, make_requests([prompt], 1, 0, 0)[0].prompt_ids) == seen
        if train_with == "without_demonstrations":
            assert (prompt.token_ids == bare.token_ids).all()
    first = read(settings, held_out[0].token_ids)
    assert (sum(row["completion"] in first for row in ROWS[:12]) == 3) == (train_with == "with_demonstrations")
    assert held_out[0].context_ids is None


def test_demonstrations_beyond_the_prompts_tokens_go_from_the_far_end_and_are_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        settings = config(tmp_path, "data.max_prompt_tokens=110")
        train, _ = load_prompts(settings)
    assert max(len(prompt.token_ids) for prompt in train) <= 110
    counts = [sum(row["completion"] in read(settings, prompt.token_ids) for row in ROWS[:12]) for prompt in train]
    dropped = sum(3 - count for count in counts)
    assert dropped > 0
    assert max(counts) > 0
    assert f"{dropped} farthest demonstrations dropped" in caplog.text


def test_plain_text_is_written_as_its_form_says(tmp_path):
    text = "rollout.demonstrations={count: 1, context: {layout: text, question: 'Q {prompt} A ', separator: ' / '}}"
    settings = config(tmp_path, text, "data.chat=false")
    seen = read(settings, load_prompts(settings)[0][0].token_ids)
    assert seen.endswith(" / Q what is 0 plus one A ")
    assert seen.split(" / ")[0].lower().startswith("q what is ")


@pytest.mark.parametrize(
    ("overrides", "rows", "words"),
    [
        (["rollout.demonstrations.count=13"], ROWS, r"rows.jsonl: 12 examples cannot give 13 demonstrations"),
        (["rollout.demonstrations.answer_field=solution"], ROWS, r"solution: expected text, found nothing; the row has prompt"),
        ([], [*ROWS, {"prompt": "x", "completion": " "}], r"rows.jsonl.*14.*completion: expected text, found an empty text"),
        (["data.chat=false"], ROWS, r"layout 'turns' with data.chat false: expected text"),
        (["environment={name: guessing}"], ROWS, "an environment starts its own conversation"),
        (
            ["rollout.demonstrations.train_with=without_demonstrations", "algorithm.off_policy_correction.level=token"],
            ROWS,
            "compares with the rollout engine, which reads another context",
        ),
        (["rollout.demonstrations.selection=nearest"], ROWS, "encoder and selection nearest belong together"),
        (["rollout.demonstrations.count=0"], ROWS, r"rollout\.demonstrations\.count"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, overrides, rows, words):
    with pytest.raises(UserError, match=words):
        load_prompts(config(tmp_path, *overrides, rows=rows))


def test_importance_weights_stay_off_when_another_context_is_trained_on_asynchronously(tmp_path):
    assert config(tmp_path, "async.max_staleness=1").algorithm.off_policy_correction.level == "token"
    bare = config(tmp_path, "async.max_staleness=1", "rollout.demonstrations.train_with=without_demonstrations")
    assert bare.algorithm.off_policy_correction.level == "none"
