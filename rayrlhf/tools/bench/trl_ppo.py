"""Script that runs TRL's PPOTrainer, with its release first on the path.

Reads a job as JSON from standard input (the fields of `PPOWork` and `token_ids`). The last line of its output is a JSON list
with the seconds of each update after the first.
"""

import json
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any


def run(job: dict[str, Any]) -> list[float]:
    """Train the job's number of updates; returns the seconds of each after the first."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

    disable_progress_bars()
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    def classifier(path: str) -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    tokenizer = AutoTokenizer.from_pretrained(job["policy"], padding_side="left")
    rows = Dataset.from_dict({"input_ids": job["token_ids"]})
    adapters: dict[str, Any] = {}
    if job["lora"]:
        from peft import LoraConfig

        adapters["peft_config"] = LoraConfig(
            r=job["lora"], lora_alpha=2 * job["lora"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(output_dir=folder, use_cpu=not torch.cuda.is_available(), **settings(job)),
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32),
            ref_model=None if adapters else AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32),
            reward_model=classifier(job["reward"]),
            value_model=classifier(job["policy"]),
            train_dataset=rows,
            eval_dataset=rows.select(range(job["prompts"])),
            callbacks=[Clock()],
            **adapters,
        )
        trainer.train()
    return [after - before for before, after in pairwise(ends)]


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of TRL's `PPOConfig` for a job."""
    return {
        "bf16": job["precision"] == "bfloat16",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": job["prompts"],
        "num_ppo_epochs": job["epochs"],
        "response_length": job["new_tokens"],
        "temperature": 1.0,
        "stop_token": "eos",
        "total_episodes": job["prompts"] * (job["updates"] + 1),
        "num_sample_generations": 0,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


if __name__ == "__main__":
    seconds = run(json.load(sys.stdin))
    print("\n" + json.dumps(seconds))  # noqa: T201 - what the caller reads
