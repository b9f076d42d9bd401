"""A chain from SFT over DPO to an evaluation with several answers a prompt is settled before its first stage runs."""

import pytest

from rayrlhf.config.pipelines import ChainConfig
from rayrlhf.config.tuning import DPOConfig
from rayrlhf.errors import UserError
from rayrlhf.pipelines.chain.run_chain import plan_chain

TINY = "builtin:tiny?layers=1&hidden=64&context=64"


def chain(folder, **dpo):
    data = {"chat": False, "max_length": 64}
    demonstrations = data | {"train": {"path": "builtin:sums"}}
    stages = [
        {
            "name": "sft",
            "kind": "sft",
            "settings": {"model": {"path": TINY}, "data": demonstrations},
        },
        {
            "name": "dpo",
            "kind": "dpo",
            "settings": {
                "model": {"path": "${sft.export}"},
                "data": data | {"train": {"path": "builtin:sum-pairs"}},
                "train": {"loss": "ipo"} | dpo,
            },
        },
        {
            "name": "judge",
            "kind": "evaluate",
            "settings": {
                "model": {"path": "${dpo.export}"},
                "data": {"path": "builtin:sums", "chat": False},
                "reward": {"functions": [{"name": "gsm8k"}]},
                "samples": 4,
                "temperature": 1.0,
            },
        },
    ]
    return ChainConfig.model_validate({"run": {"name": "sums", "root": folder}, "stages": stages})


def test_dpo_begins_at_what_sft_exports_and_its_own_export_is_judged(tmp_path):
    sft, dpo, judge = plan_chain(chain(tmp_path), tmp_path)
    assert isinstance(dpo.config, DPOConfig)
    assert dpo.config.model.path == str(sft.folder / "export")
    assert dpo.config.run.folder == tmp_path / "sums" / "dpo"
    assert judge.config.model.path == str(dpo.folder / "export")


def test_a_mistake_in_a_dpo_stage_is_named_with_its_stage(tmp_path):
    with pytest.raises(UserError, match=r"stage dpo.*bata"):
        plan_chain(chain(tmp_path, bata=0.2), tmp_path)
