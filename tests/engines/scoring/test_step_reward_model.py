"""A process reward model: probabilities of steps, their aggregation, and which kind of model is expected where."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rayrlhf.actors.reward_actor import RewardActor
from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardModelSection, RewardSection
from rayrlhf.data.answer_format import AnswerFormat
from rayrlhf.data.records import Prompt, Rollout, SampleKey
from rayrlhf.engines.scoring.reward_ensemble import RewardEnsemble
from rayrlhf.engines.scoring.reward_model import RewardModelEngine, check_reward_models
from rayrlhf.errors import UserError
from rayrlhf.models.tiny import byte_tokenizer
from rayrlhf.rewards.functions import MODEL_PART, STEPS_PART
from tests.engines.training import write_llama

PROMPTS, RESPONSES = ["1+2+3=", "4+5+6=", "7="], ["1+2=3\n3+3=6", "4+5=9\n9+6=16\n", "7"]
PAIR = "{prompt}{response}"


def write_classifier(folder, labels, kind):
    """A classifier with a random head, as transformers saves it."""
    import transformers

    start = write_llama(folder.with_name(f"{folder.name}-start"), vocabulary=259)
    torch.manual_seed(1)
    model = getattr(transformers, kind).from_pretrained(start, num_labels=labels, pad_token_id=0)
    with torch.no_grad():
        model.score.weight.normal_()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return ModelSection(path=str(folder), dtype="float32")


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("process") / "model", 2, "AutoModelForTokenClassification")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("outcome") / "model", 1, "AutoModelForSequenceClassification")


def section(model, template=PAIR, **steps):
    return RewardModelSection(model=model, template=template, steps=steps or None)


def expected_steps(model, prompt, response):
    """The probabilities that transformers gives the second label at the last token of each step."""
    from transformers import AutoModelForTokenClassification

    classifier, tokenizer = AutoModelForTokenClassification.from_pretrained(model.path).eval(), byte_tokenizer()
    ids = tokenizer(prompt + response.removesuffix("\n") + "\n", add_special_tokens=False)["input_ids"]
    (line,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        probabilities = classifier(torch.tensor([ids])).logits[0].softmax(-1)[:, 1]
    return probabilities[torch.tensor(ids) == line].tolist()


def test_steps_have_the_probabilities_of_a_token_classifier(process):
    found = RewardModelEngine(section(process, separator="\n")).score_steps(PROMPTS, RESPONSES)
    for prompt, response, steps in zip(PROMPTS, RESPONSES, found, strict=True):
        np.testing.assert_allclose(steps.probabilities, expected_steps(process, prompt, response), atol=1e-5)
    assert [steps.ends for steps in found] == [[6, 11], [6, 13], [1]]


@pytest.mark.parametrize(
    ("aggregate", "combine"), [("min", min), ("product", np.prod), ("last", lambda p: p[-1]), ("sum", sum)]
)
def test_the_score_of_a_response_aggregates_its_steps(process, aggregate, combine):
    ensemble = RewardEnsemble(section(process, separator="\n", aggregate=aggregate))
    parts = ensemble.parts(PROMPTS, RESPONSES)
    expected = [combine(expected_steps(process, *pair)) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(parts[MODEL_PART], expected, atol=1e-5)
    assert parts[STEPS_PART].tolist() == [2, 2, 1]
    assert ensemble.weights == {MODEL_PART: 1.0, STEPS_PART: 0.0}


def rollout_of(index, text):
    ids = np.array(byte_tokenizer()(text + "<|im_end|>", add_special_tokens=False)["input_ids"], np.int32)
    ones = np.ones(len(ids), np.float32)
    return Rollout(
        SampleKey(0, index, 0), np.array([5], np.int32), ids, ones.astype(bool), ones, ones.astype(np.int32), "stop", text, 0
    )


@pytest.mark.parametrize("per", ["step", "response"])
def test_the_reward_actor_pays_each_step_at_its_last_token(process, per):
    model = section(process, separator="\n", aggregate="sum", per=per).model_copy(update={"weight": 2.0})
    actor = RewardActor()
    actor.build(RewardSection(model=model), "auto", process)
    rollouts = [rollout_of(index, text) for index, text in enumerate(RESPONSES)]
    batch = actor.score([Prompt(index, text, np.array([5], np.int32)) for index, text in enumerate(PROMPTS)], rollouts)
    steps = [expected_steps(process, *pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    np.testing.assert_allclose(batch.scores, [2 * sum(one) for one in steps], atol=1e-5)
    if per == "response":
        assert batch.tokens is None
        return
    paid = [{int(at): float(row[at]) for at in np.flatnonzero(row)} for row in batch.tokens]
    places = [[5, 11], [5, 13], [1]]  # of the line break, and of the end of the response
    for found, at, one in zip(paid, places, steps, strict=True):
        assert found == pytest.approx(dict(zip(at, [2 * p for p in one], strict=True)), abs=1e-5)


def test_the_kind_and_the_separator_are_checked_before_weights_load(process, outcome, tmp_path):
    for model, steps, message in (
        (process, {}, "a process reward model, which scores steps; set reward.model.steps"),
        (outcome, {"separator": "\n"}, "an outcome reward model, which scores whole responses; remove reward.model.steps"),
        (process, {"aggregate": "min"}, "no separator of steps is stored with it; set reward.model.steps.separator"),
    ):
        with pytest.raises(UserError, match=message):
            check_reward_models(section(model, **steps))
    check_reward_models(section(process, separator="\n"))
    check_reward_models(section(outcome))


@pytest.mark.parametrize("kind", ["process", "outcome"])
def test_the_stored_format_says_the_kind(kind, process, outcome, tmp_path):
    import shutil

    model = {"process": process, "outcome": outcome}[kind]
    folder = Path(shutil.copytree(model.path, tmp_path / "model"))
    stored = ModelSection(path=str(folder), dtype="float32")
    AnswerFormat(step_separator=None if kind == "process" else "\n").write(folder)  # overrules the name of the class
    wanted = {"process": ({"separator": "\n"}, "an outcome reward model"), "outcome": ({}, "a process reward model")}[kind]
    with pytest.raises(UserError, match=wanted[1]):
        check_reward_models(section(stored, **wanted[0]))
    AnswerFormat(step_separator=";").write(folder)
    with pytest.raises(
        UserError, match=r"trained with ';' between steps, expected the same as reward\.model\.steps\.separator"
    ):
        check_reward_models(section(stored, separator="\n"))
    check_reward_models(section(stored, aggregate="last"))


def test_steps_that_do_not_fit_are_one_line(process):
    engine = RewardModelEngine(section(process, separator="\n").model_copy(update={"max_length": 10}))
    assert len(engine.score_steps(["1+2="], ["3\n4"])[0].probabilities) == 2
    with pytest.raises(
        UserError, match=r"reward\.model\.max_length 10: the 2 steps of a response and their prompt have 14 tokens"
    ):
        engine.score_steps([""], ["1\n2+2+2+2+2+2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": [{"path": "m"}]}, "steps: members and normalize have no effect"),
        ({"normalize": True}, "steps: members and normalize have no effect"),
        ({"template": "{response} to {prompt}"}, "steps: expected a template that ends with {response}"),
    ],
)
def test_settings_without_effect_on_steps_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RewardModelSection.model_validate({"model": {"path": "m"}, "steps": {}, **change})
