"""TRL 1.16's own preparation of rows, without a model: what its trainers would feed."""

from types import SimpleNamespace

from datasets import Dataset
from trl import RewardConfig, RewardTrainer, SFTTrainer
from trl import SFTConfig as TrlSFTConfig


def prepare_supervised(rows, tokenizer, tmp_path, *, completion_only=False, assistant_only=False, max_length=None):
    """Return `input_ids` and `labels` of each sample."""
    # completion_only is what the trainer derives from the format before it prepares; here it is said.
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=completion_only)
    arguments = TrlSFTConfig(
        output_dir=str(tmp_path),
        assistant_only_loss=assistant_only,
        max_length=max_length,
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    prepared = SFTTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, arguments, False, None, "train")
    return [(row["input_ids"], row["labels"]) for row in prepared]


def prepare_pairs(rows, tokenizer, tmp_path, *, max_length=None):
    """Return the ids of chosen and rejected of each pair."""
    arguments = RewardConfig(output_dir=str(tmp_path), max_length=max_length, use_cpu=True, bf16=False, report_to=[])
    prepared = RewardTrainer._prepare_dataset(SimpleNamespace(), Dataset.from_list(rows), tokenizer, arguments, "train")
    return [(row["chosen_ids"], row["rejected_ids"]) for row in prepared]
