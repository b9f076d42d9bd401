"""`rayrlhf bench sft`: training tokens per second of our SFT and TRL's `SFTTrainer`.

Both train on all tokens of the same texts with AdamW, alternately, every run in its own process. Timed are the optimizer steps
after the first, with everything between them, but without loading and tokenizing. Padding does not count. TRL runs without
gradient checkpointing, which is on by default and would make it slower. Each trainer forms its own micro-batches: TRL pads its
eight samples to the longest or, with packing, concatenates its packs in one row, whose attention on a CPU costs the square of
the whole row; ours attends sample by sample.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayrlhf.config.data import SupervisedDataSection, SupervisedDatasetSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import SupervisedTrainSection
from rayrlhf.config.tuning import SFTConfig
from rayrlhf.data.supervised.datasets import SupervisedSample
from rayrlhf.data.toy.word_problems import generate
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.process_group import join_alone
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer
from rayrlhf.models.load import load_tokenizer
from rayrlhf.models.model_path import resolve_path
from rayrlhf.tools.bench.paired import Comparison, Precision, compare, in_new_process
from rayrlhf.tuning.data_plan import batch_plan
from rayrlhf.tuning.sample_table import SampleTable
from rayrlhf.tuning.step_trainer import StepRecorder, StepTrainer
from rayrlhf.tuning.task import SupervisedTask

MODEL = "builtin:tiny"
"""3.2 million parameters."""
BATCH, MAX_LENGTH, LEARNING_RATE = 8, 1024, 1e-4
PADDED_TOKENS, PACK_TOKENS = MAX_LENGTH, 4096
"""Maximum tokens of our micro-batches. Padded ones hold samples of similar length: 1 % of their tokens is padding here, and
would be 40 % with all eight samples padded to the longest. Packs have none."""
MEDIAN_CHARACTERS, DEVIATION = 480, 0.45
"""Median and log standard deviation of the lengths, close to those of GSM8K's questions with solutions."""


def texts(count: int, seed: int = 0) -> list[str]:
    """Return texts of GSM8K's lengths, from built-in word problems."""
    generator = np.random.default_rng(seed)
    rows = iter(generate(seed, 8 * count, "train"))
    made = []
    for length in np.exp(generator.normal(np.log(MEDIAN_CHARACTERS), DEVIATION, count)).clip(120, MAX_LENGTH - 2):
        text = ""
        while len(text) < length and (row := next(rows, None)) is not None:
            text += f"{row['question']}\n{row['solution']}\n"
        made.append(text[: int(length)])
    return made


def bench_sft(
    *, precision: Precision, packing: bool, rounds: int, steps: int, progress: Callable[[str], None] = lambda _: None
) -> Comparison:
    """Measure both trainers.

    Args:
        packing: pack samples. A step is then about `BATCH` x `MAX_LENGTH` tokens for both, else `BATCH` samples.
        steps: optimizer steps of a run after the first, which is not timed.

    Raises:
        UserError: TRL is not installed.
    """
    try:
        import trl
    except ImportError as error:
        raise UserError("bench sft: TRL is not installed; expected `pip install 'rayrlhf[test]'`") from error
    written = texts((steps + 2) * (2 * BATCH if packing else BATCH) + BATCH)
    contenders: Mapping[str, Callable[[], float]] = {
        f"TRL {trl.__version__}": lambda: in_new_process(_run_trl, written, precision, packing, steps),
        "rayrlhf": lambda: in_new_process(_run_ours, written, precision, packing, steps),
    }
    title = f"SFT of {MODEL}, {precision}, packing {'on' if packing else 'off'}, {torch.get_num_threads()} threads"
    return compare(title, "tokens/s", contenders, rounds, progress)


def _run_ours(written: list[str], precision: Precision, packing: bool, steps: int) -> float:
    """Take the steps as a worker does, including metrics in a run folder."""
    join_alone()
    train = SupervisedTrainSection(
        learning_rate=LEARNING_RATE,
        steps=steps + 1,
        packing=packing,
        batch_size=None if packing else BATCH,
        batch_tokens=BATCH * MAX_LENGTH if packing else None,
        micro_batch_tokens=PACK_TOKENS if packing else PADDED_TOKENS,
    )
    data = SupervisedDataSection(train=SupervisedDatasetSection(path="made"), max_length=MAX_LENGTH)
    config = SFTConfig(model=ModelSection(path=MODEL, dtype=precision), data=data, train=train)
    task, table = SupervisedTask(config), SampleTable.of(_samples(written, config.model))
    plan = batch_plan(task, table)
    trainer = StepTrainer(task, TrainEngine(task.spec(plan.total_steps)), table, plan)
    with tempfile.TemporaryDirectory() as folder:
        recorder = StepRecorder(Path(folder), 0, tensorboard=False)
        trainer.take(1, recorder)
        started = time.perf_counter()
        tokens = sum(trainer.take(step, recorder) for step in range(2, steps + 2))
        seconds = time.perf_counter() - started
        recorder.close()
    return tokens / seconds


def _samples(written: list[str], model: ModelSection) -> list[SupervisedSample]:
    ids = _token_ids(written, load_tokenizer(model))
    samples = []
    for row, one in enumerate(ids):
        mask = np.ones(len(one), dtype=np.bool_)
        mask[0] = False
        samples.append(SupervisedSample(np.asarray(one, dtype=np.int32), mask, row))
    return samples


def _token_ids(written: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(written)["input_ids"]]


def _run_trl(written: list[str], precision: Precision, packing: bool, steps: int) -> float:
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_config import SFTConfig as TrlConfig
    from trl.trainer.sft_trainer import SFTTrainer

    disable_progress_bars()
    model_section = ModelSection(path=MODEL, dtype=precision)
    tokenizer = load_tokenizer(model_section)
    model = AutoModelForCausalLM.from_pretrained(resolve_path(model_section), dtype=torch.float32)
    clock = _StepClock()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        arguments = TrlConfig(
            output_dir=folder,
            use_cpu=not torch.cuda.is_available(),
            bf16=precision == "bfloat16",
            gradient_checkpointing=False,
            per_device_train_batch_size=BATCH,
            max_steps=steps + 1,
            learning_rate=LEARNING_RATE,
            max_length=MAX_LENGTH,
            packing=packing,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        dataset = Dataset.from_dict({"input_ids": _token_ids(written, tokenizer)})
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
        trainer.add_callback(clock.callback())
        trainer.data_collator = clock.counting(trainer.data_collator)
        trainer.train()
    return clock.tokens_per_second(steps)


class _StepClock:
    """End times and token counts of TRL's steps."""

    def __init__(self) -> None:
        self._ends: list[float] = []
        self._tokens: list[int] = []

    def callback(self) -> Any:
        from transformers import TrainerCallback

        ends = self._ends

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: object, **__: object) -> None:
                ends.append(time.perf_counter())

        return Callback()

    def counting(self, collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def counted(examples: Any) -> Any:
            self._tokens.append(sum(len(example["input_ids"]) for example in examples))
            return collate(examples)

        return counted

    def tokens_per_second(self, steps: int) -> float:
        """Return the speed after the first step; batches are collated in step order, some ahead."""
        return sum(self._tokens[1 : steps + 1]) / (self._ends[steps] - self._ends[0])
