"""Old spellings of keys and values: accepted, noticed once, and merged with presets and stored configurations."""

import pytest
import yaml

from rayrlhf.config.loading import load
from rayrlhf.config.loading.kinds import ROOTS, config_class
from rayrlhf.config.loading.load import dump_config, load_config, stored_config
from rayrlhf.config.loading.problems import sections_in
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.section import Section


@pytest.fixture(autouse=True)
def _nothing_noticed_yet(monkeypatch):
    monkeypatch.setattr(load, "_noticed", set())


def sections(root: type[Section]) -> set[type[Section]]:
    found = {root}
    for field in root.model_fields.values():
        for section, _ in sections_in(field.annotation):
            found |= sections(section)
    return found


ALL = sorted(set().union(*(sections(config_class(task)) for task in ROOTS)), key=lambda section: section.__name__)


@pytest.mark.parametrize("section", [section for section in ALL if section.renamed_keys or section.renamed_values])
def test_an_old_key_points_to_a_key_and_is_none_itself(section):
    keys = {field.alias or name for name, field in section.model_fields.items()}
    assert set(section.renamed_keys.values()) <= keys
    assert not set(section.renamed_keys) & keys
    assert set(section.renamed_values) <= keys


def test_an_old_key_sets_the_new_one_and_prints_one_line(minimal, capsys):
    config = load_config(
        PPOConfig, minimal, ["algorithm.correction.level=sequence", "algorithm.policy_loss.normalisation=sequence"]
    )
    assert config.algorithm.off_policy_correction.level == "sequence"
    assert config.algorithm.policy_loss.loss_aggregation == "sequence"
    assert capsys.readouterr().err.splitlines() == [
        "rayrlhf: configuration: algorithm.correction is now algorithm.off_policy_correction; the old spelling still works",
        "rayrlhf: configuration: algorithm.policy_loss.normalisation is now algorithm.policy_loss.loss_aggregation; "
        "the old spelling still works",
    ]
    load_config(PPOConfig, minimal, ["algorithm.correction.level=sequence"])
    assert capsys.readouterr().err == ""


def test_an_old_key_is_found_in_the_section_of_every_loss(minimal):
    for name in ("ppo", "gspo", "cispo"):
        loss = f"algorithm.policy_loss={{name: {name}, normalisation: constant, normalisation_length: 9}}"
        section = load_config(PPOConfig, minimal, [loss]).algorithm.policy_loss
        assert (section.name, section.loss_aggregation, section.loss_aggregation_length) == (name, "constant", 9)


def test_a_section_under_both_names_is_merged_and_the_old_name_wins(minimal):
    config = load_config(
        PPOConfig,
        minimal,
        ["algorithm.correction={level: token, high: 2.0}", "algorithm.off_policy_correction={high: 5.0, low: 0.5}"],
    )
    section = config.algorithm.off_policy_correction
    assert (section.level, section.low, section.high) == ("token", 0.5, 2.0)


def test_an_old_key_lies_over_the_new_key_of_a_preset(minimal):
    settings = ["preset=dr-grpo", "algorithm.policy_loss.normalisation=token"]
    assert load_config(PPOConfig, minimal, settings).algorithm.policy_loss.loss_aggregation == "token"


def test_a_wrong_value_under_an_old_key_is_an_error_at_the_new_key(minimal):
    from rayrlhf.errors import UserError

    with pytest.raises(UserError, match=r"algorithm\.off_policy_correction\.level: expected 'none', 'token' or 'sequence'"):
        load_config(PPOConfig, minimal, ["algorithm.correction.level=tokens"])


def test_the_stored_configuration_of_an_older_run_is_that_of_the_new_names(minimal):
    config = load_config(
        PPOConfig, minimal, ["sft_warmup.response_field=answer", "algorithm.off_policy_correction.level=token"]
    )
    tree = yaml.safe_load(dump_config(config))
    algorithm = tree["algorithm"]
    tree["warmup"] = tree.pop("sft_warmup")
    algorithm["correction"] = algorithm.pop("off_policy_correction")
    algorithm["policy_loss"].pop("loss_aggregation")
    algorithm["policy_loss"] |= {
        "normalisation": None,
        "normalisation_length": algorithm["policy_loss"].pop("loss_aggregation_length"),
    }
    assert stored_config(PPOConfig, yaml.safe_dump(tree)) == config


def test_the_stored_configuration_of_an_older_cispo_run_loads(minimal):
    tree = yaml.safe_load(dump_config(load_config(PPOConfig, minimal)))
    # All losses had the keys of one section, and every value was written out.
    tree["algorithm"]["policy_loss"] = {
        "name": "cispo", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "entropy_coefficient": 0.0,
        "normalisation": None, "normalisation_length": None,
    }  # fmt: skip
    section = stored_config(PPOConfig, yaml.safe_dump(tree)).algorithm.policy_loss
    assert section.loss_arguments == {"clip_high": 0.2}
    assert section.loss_aggregation == "token"
