"""Every tuning starts from the base model with the run's settings, on the dataset it is told."""

from rayrlhf.pipelines.presft.sft_configs import TEMPLATE_TOKENS, sft_config, tuned_model
from tests.pipelines.presft.runs import MODEL, presft_config


def test_a_tuning_takes_base_seed_and_settings_and_differs_in_folder_and_dataset(tmp_path):
    config = presft_config(tmp_path, "run.seed=7", "train.epochs=3", "data.chat=false", "data.system_prompt=be brief")
    first, second = (
        sft_config(config, tmp_path / name, tmp_path / f"{name}.parquet", None, longest=40) for name in ("tuned", "again")
    )
    assert first.model == second.model == config.model
    assert first.train == second.train == config.train
    assert (first.run.folder, first.run.seed) == (tmp_path / "tuned", 7)
    assert (first.data.chat, first.data.system_prompt, first.data.max_length) == (False, "be brief", 40 + TEMPLATE_TOKENS)
    assert second.data.train.path == str(tmp_path / "again.parquet")
    assert not first.has_evaluation


def test_held_out_rows_give_a_held_out_loss(tmp_path):
    config = presft_config(tmp_path)
    assert sft_config(config, tmp_path / "t", tmp_path / "d", tmp_path / "held.parquet", longest=8).has_evaluation


def test_the_tuned_model_is_whole_where_adapters_were_trained(tmp_path):
    plain, adapted = presft_config(tmp_path), presft_config(tmp_path, "model.lora.rank=4")
    assert tuned_model(plain, tmp_path).path == str(tmp_path / "export")
    merged = tuned_model(adapted, tmp_path)
    assert merged.path == str(tmp_path / "export-merged")
    assert merged.lora is None
    assert plain.model.path == MODEL
