"""Several reward models as one reward."""

import json
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rayrlhf.config.model import ModelSection
from rayrlhf.config.reward import RewardModelSection
from rayrlhf.engines.scoring.reward_ensemble import MODEL_PART, SPREAD_PART, RewardEnsemble, pessimistic
from rayrlhf.engines.scoring.reward_model import STATISTICS_FILE, RewardModelEngine
from rayrlhf.errors import UserError
from rayrlhf.models.network import build_network
from rayrlhf.models.tiny import byte_tokenizer
from tests.engines.training import write_llama

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


def test_mistakes_are_one_clear_line(members, tmp_path):
    with pytest.raises(ValueError, match="uncertainty has no effect without members"):
        section(members[:1], uncertainty=1.0)
    with pytest.raises(UserError, match="missing"):
        RewardEnsemble(section([members[0], ModelSection(path=str(tmp_path / "missing"))]))


def test_a_hub_name_scores_as_the_same_files_in_a_folder(members, tmp_path, monkeypatch):
    import shutil

    import huggingface_hub.constants

    commit = "0" * 40
    repository = tmp_path / "models--acme--rm"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(members[2].path, repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub = ModelSection(path="acme/rm", dtype="float32")
    scores = RewardModelEngine(section([hub], normalize=True)).score(PROMPTS, RESPONSES)
    expected = RewardModelEngine(section([members[2]], normalize=True)).score(PROMPTS, RESPONSES)
    assert len(set(scores.tolist())) == 3
    np.testing.assert_array_equal(scores, expected)
    critic = build_network(hub, frozenset({"value"}), "zero", 0)
    assert critic.v_head.summary.weight.abs().max() > 0
    shutil.rmtree(repository / "snapshots")
    with pytest.raises(UserError, match="acme/rm"):
        RewardModelEngine(section([hub]))


def test_a_token_beyond_the_reward_model_is_one_line(members, tmp_path):
    import shutil

    folder = shutil.copytree(members[0].path, tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    tokenizer.save_pretrained(folder)
    engine = RewardModelEngine(section([ModelSection(path=str(folder), dtype="float32")]))
    engine.score(["a"], ["b"])
    with pytest.raises(UserError, match="its tokenizer writes token 259, expected at most 258"):
        engine.score(["a"], ["b<|new|>"])
