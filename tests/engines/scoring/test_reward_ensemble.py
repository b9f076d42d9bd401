"""Several reward models as one reward."""

import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save_file
from transformers import AutoTokenizer

from rayrlhf.actors.reward_actor import RewardActor
from rayrlhf.batch_inference.generation import Response
from rayrlhf.config.batch_inference import PairsSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.pipelines import EvaluateConfig, ProbeSection, RelabelSection
from rayrlhf.config.reward import RewardModelSection, RewardSection
from rayrlhf.data.records import Prompt, Rollout, SampleKey
from rayrlhf.engines.scoring.reward_ensemble import RewardEnsemble, pessimistic
from rayrlhf.engines.scoring.reward_model import STATISTICS_FILE, RewardModelEngine, check_reward_models, stored_chance
from rayrlhf.errors import AlarmError, UserError
from rayrlhf.models.network import build_network
from rayrlhf.models.tiny import byte_tokenizer
from rayrlhf.models.value_head import find_head
from rayrlhf.observe.samples import read_samples
from rayrlhf.pipelines.evaluation.evaluate_model import ANSWERS, evaluate_model
from rayrlhf.pipelines.presft.probing import schemas
from rayrlhf.pipelines.presft.relabeling import PairDecider, with_candidates
from rayrlhf.pipelines.presft.selection import Cut
from rayrlhf.rewards.functions import MODEL_PART, SPREAD_PART
from tests.engines.training import write_llama
from tests.models.hub import as_hub_model

PROMPTS, RESPONSES = ["a", "b", "c"], ["one", "two two", "three"]
ROWS = arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 4)), elements=st.floats(-100, 100, width=32))


@given(ROWS, st.floats(0, 3))
def test_the_reward_is_the_mean_less_deviations_computed_by_hand(values, coefficient):
    expected = [
        statistics.fmean(column) - coefficient * statistics.pstdev(column) for column in values.astype(float).T.tolist()
    ]
    np.testing.assert_allclose(pessimistic(values, coefficient), expected, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Three scalar-head models with different heads, as transformers saves them, with statistics."""
    from transformers import AutoModelForSequenceClassification

    folders = []
    for number in range(3):
        folder = tmp_path_factory.mktemp("member")
        start = write_llama(folder / "start", vocabulary=259)
        torch.manual_seed(number)
        AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, pad_token_id=0).save_pretrained(
            folder / "model"
        )
        byte_tokenizer().save_pretrained(folder / "model")
        (folder / "model" / STATISTICS_FILE).write_text(json.dumps({"mean": number, "spread": 0.5 + number}))
        folders.append(ModelSection(path=str(folder / "model"), dtype="float32"))
    return folders


def section(members, **changes):
    return RewardModelSection(model=members[0], members=members[1:], template="{prompt}{response}", **changes)


@pytest.mark.parametrize("normalize", [False, True])
def test_each_member_scores_by_itself_and_by_its_own_statistics(members, normalize):
    ensemble = RewardEnsemble(section(members, uncertainty=0.7, weight=2.0, normalize=normalize))
    alone = [
        RewardModelEngine(section([member], normalize=normalize)).score(PROMPTS, RESPONSES).astype(float) for member in members
    ]
    parts = ensemble.parts(PROMPTS, RESPONSES)
    assert ensemble.weights == {MODEL_PART: 2.0, SPREAD_PART: 0.0}
    assert (parts[SPREAD_PART] > 0).all()
    np.testing.assert_allclose(parts[SPREAD_PART], np.std(alone, axis=0), rtol=1e-4)
    np.testing.assert_allclose(parts[MODEL_PART], np.mean(alone, axis=0) - 0.7 * np.std(alone, axis=0), rtol=1e-4, atol=1e-6)


def test_one_model_alone_is_what_it_was(members):
    alone = RewardEnsemble(section(members[:1]))
    parts = alone.parts(PROMPTS, RESPONSES)
    assert alone.weights == {MODEL_PART: 1.0}
    assert list(parts) == [MODEL_PART]
    np.testing.assert_array_equal(parts[MODEL_PART], RewardModelEngine(section(members[:1])).score(PROMPTS, RESPONSES))


def test_a_classifier_with_several_outputs_gives_their_weighted_sum(tmp_path):
    from transformers import AutoModelForSequenceClassification

    start = write_llama(tmp_path / "start", vocabulary=259)
    torch.manual_seed(0)
    names = {0: "helpful", 1: "honest", 2: "long"}
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=3, pad_token_id=0, id2label=names).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    several = ModelSection(path=str(tmp_path / "model"), dtype="float32")
    found = RewardModelEngine(section([several], outputs={"helpful": 2.0, "2": -0.5})).score(PROMPTS, RESPONSES)
    with torch.no_grad():
        logits = [
            model(torch.tensor([tokenizer(prompt + response)["input_ids"]])).logits[0]
            for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
        ]
    np.testing.assert_allclose(found, [2 * float(row[0]) - 0.5 * float(row[2]) for row in logits], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"no scalar head .*set reward.model.outputs"):
        check_reward_models(section([several]))
    with pytest.raises(UserError, match=r"reward.model.outputs: .* has no output 'helpfull'; did you mean 'helpful'"):
        check_reward_models(section([several], outputs={"helpfull": 1.0}))


def test_labels_that_are_numerals_name_outputs_before_their_numbers(tmp_path):
    save_file({"score.weight": torch.tensor([[1.0], [10.0], [100.0]])}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"id2label": {"0": "1", "1": "2", "2": "3"}}')
    assert find_head(tmp_path, {"1": 1.0, "3": 2.0})["weight"].tolist() == [[201.0]]
    assert find_head(tmp_path, {"0": 1.0})["weight"].tolist() == [[1.0]]


@pytest.fixture(scope="module")
def conversations():
    """Two prompts that differ in their first turn only."""
    end = [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "why?"}]
    return [[{"role": "user", "content": first}, *end] for first in ("is it warm?", "no?")]


def test_ppo_rewards_a_response_to_the_whole_conversation(members, conversations):
    reader = RewardModelSection(model=members[0])
    expected = RewardModelEngine(reader).score(conversations, ["so"] * 2)
    assert abs(expected[0] - expected[1]) > 1e-3
    ids, ones = np.ones(2, np.int32), np.ones(2, np.float32)
    rollout = Rollout(SampleKey(0, 0, 0), ids, ids, ones > 0, ones, ids, "stop", "so", 0)
    actor = RewardActor()
    actor.build(RewardSection(model=reader), "off")
    found = actor.score([Prompt(0, "why?", ids, messages=turns) for turns in conversations], [rollout] * 2)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)


def test_an_evaluation_scores_a_response_to_the_whole_conversation(members, conversations, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": turns}) + "\n" for turns in conversations))
    tree = {
        "run": {"root": str(tmp_path)},
        "model": {"path": "builtin:tiny?layers=1&hidden=64&context=128"},
        "data": {"path": str(tmp_path / "prompts.jsonl")},
        "reward": {"model": {"model": {"path": members[0].path, "dtype": "float32"}}},
        "rollout": {"backend": "transformers", "max_new_tokens": 4},
    }
    answers = read_samples(evaluate_model(EvaluateConfig.model_validate(tree)).folder / ANSWERS)
    expected = RewardModelEngine(RewardModelSection(model=members[0])).score(
        conversations, [one["response"] for one in answers]
    )
    np.testing.assert_allclose([one["score"] for one in answers], expected, rtol=1e-4, atol=1e-5)


def test_relabeling_scores_a_response_to_the_whole_conversation(members, conversations):
    reader = RewardModelSection(model=members[0])
    values = dict.fromkeys(schemas()["scores"].names) | {"prompt": "why?", "columns": "{}", "bleu": 10.0, "response": "old"}
    probes = {"probes": ["so"], "probe_finish": ["stop"], "probe_tokens": [1], "probe_bleu": [10.0], "model": "tuned"}
    rows = [values | probes | {"row": row, "source": row, "messages": json.dumps(conversations[row])} for row in range(2)]
    table = with_candidates(
        pa.Table.from_pylist(rows, schema=schemas()["scores"]), dict.fromkeys(range(2), [Response("so", "stop", 1)] * 2)
    )
    relabel = RelabelSection(method="reward_model", samples=2, reward_model=reader)
    decided = PairDecider(relabel, ProbeSection(), PairsSection(path="pairs"), None, Cut(50.0))(table).to_pylist()
    expected = RewardModelEngine(reader).score(conversations, ["so"] * 2)
    np.testing.assert_allclose([row["candidate_scores"][0] for row in decided], expected, rtol=1e-4, atol=1e-5)


def test_mistakes_are_one_clear_line(members, tmp_path):
    with pytest.raises(ValueError, match="uncertainty has no effect without members"):
        section(members[:1], uncertainty=1.0)
    with pytest.raises(UserError, match="missing"):
        RewardEnsemble(section([members[0], ModelSection(path=str(tmp_path / "missing"))]))


def test_a_hub_name_scores_as_the_same_files_in_a_folder(members, tmp_path, monkeypatch):
    snapshot = as_hub_model(Path(members[2].path), tmp_path, "acme/rm", monkeypatch)
    (snapshot / STATISTICS_FILE).write_text('{"mean": 2, "spread": 2.5, "evaluation/chance_probability": 0.4}')
    hub = ModelSection(path="acme/rm", dtype="float32")
    scores = RewardModelEngine(section([hub], normalize=True)).score(PROMPTS, RESPONSES)
    expected = RewardModelEngine(section([members[2]], normalize=True)).score(PROMPTS, RESPONSES)
    assert len(set(scores.tolist())) == 3
    np.testing.assert_array_equal(scores, expected)
    critic = build_network(hub, frozenset({"value"}), "zero", 0)
    assert critic.v_head.summary.weight.abs().max() > 0
    assert stored_chance([hub]) == 0.4
    check_reward_models(section([hub], normalize=True))
    shutil.rmtree(snapshot.parent)
    with pytest.raises(UserError, match="acme/rm"):
        RewardModelEngine(section([hub]))


def test_a_token_beyond_the_reward_model_is_one_line(members, tmp_path):
    folder = shutil.copytree(members[0].path, tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    tokenizer.save_pretrained(folder)
    engine = RewardModelEngine(section([ModelSection(path=str(folder), dtype="float32")]))
    engine.score(["a"], ["b"])
    with pytest.raises(UserError, match="its tokenizer writes token 259, expected at most 258"):
        engine.score(["a"], ["b<|new|>"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nonfinite_reward_is_named_and_never_no_reward(members, monkeypatch, value):
    ensemble = RewardEnsemble(section(members[:2]))
    monkeypatch.setattr(ensemble._members[1], "score", lambda *_: np.array([0.0, value, 1.0], np.float32))
    with pytest.raises(AlarmError, match=rf"reward model {members[1].path}: reward {value} of sample 1, expected a finite"):
        ensemble.parts(PROMPTS, RESPONSES)


def test_a_model_that_is_no_reward_model_is_refused_before_weights_load(members, tmp_path):
    policy = ModelSection(path=str(write_llama(tmp_path / "policy", vocabulary=259)), dtype="float32")
    byte_tokenizer().save_pretrained(policy.path)
    with pytest.raises(UserError, match=r"reward\.model '.*policy': no scalar head in its files"):
        check_reward_models(section([members[0], policy]))


def test_a_text_is_cut_to_the_positions_of_the_reward_model(tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=24, vocab_size=259, num_labels=1, pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    engine = RewardModelEngine(section([ModelSection(path=str(tmp_path), dtype="float32")]))
    assert engine.score(["a"], ["b" * 60]) == engine.score(["a"], ["b" * 90])


def test_a_chat_template_that_refuses_a_role_is_one_line(members, tmp_path):
    folder = Path(shutil.copytree(members[0].path, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusal + "{{ messages[-1]['content'] }}"
    tokenizer.save_pretrained(folder)
    engine = RewardModelEngine(RewardModelSection(model=ModelSection(path=str(folder), dtype="float32")))
    turns = [{"role": "user", "content": "why?"}]
    engine.score([turns], ["so"])
    with pytest.raises(
        UserError, match=r"its chat template refuses a conversation: no system role; set reward\.model\.template"
    ):
        engine.score([[{"role": "system", "content": "be brief"}, *turns]], ["so"])
