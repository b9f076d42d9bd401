"""`rayrlhf bench prefix`: updates and scoring with shared prefixes, without, and in plain torch.

All have float32 weights and use autocast for bfloat16 and torch's fused AdamW. They are kept alive between runs; one works at a
time. Speeds count all tokens of all samples, also those that sharing saves, so that they compare times. Tokens are random: no
speed depends on their values. Memory is what an update needs beyond weights, gradients and optimizer states.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import torch

from rayrlhf.actors.footprint import own_footprint
from rayrlhf.config.model import ModelSection
from rayrlhf.config.section import GIB
from rayrlhf.config.train import SharePrefixes, TrainSection
from rayrlhf.data.prefix_tree import prefix_tree
from rayrlhf.data.records import TokenSequence
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.base import Objective
from rayrlhf.engines.objectives.policy import PolicyObjective
from rayrlhf.engines.objectives.preference import DirectPreferenceObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.process_group import join_alone
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.engines.train.supervised_batches import PAIR_MASK, REFERENCE
from rayrlhf.tools.bench.paired import Comparison, Precision, compare, in_new_process
from rayrlhf.tools.bench.ppo_step import run_ours, write_reward_model
from rayrlhf.tools.bench.update_speed import PlainTrainer
from rayrlhf.tools.bench.work import PPOWork

SEED = 0
LEARNING_RATE = 1e-6
STEP_PROMPTS = 4
MODES: tuple[SharePrefixes, ...] = ("off", "auto")
"""The first is the baseline."""

CASES: Mapping[str, Sequence[tuple[int, int, int]]] = {
    "group": [(100, 100, 8)] * 2,
    "long-prompt": [(512, 128, 16)],
    "demonstrations": [(1000, 64, 8)],
    "pairs": [(120, 80, 2)] * 8,
    "agent": [(80, 40, 8)],
    "none": [(100, 100, 1)] * 8,
}
"""Name -> (prompt tokens, response tokens, samples) of each prompt; the samples of `agent` are turns that follow each other."""


def bench_prefix(
    model: str,
    cases: Sequence[str],
    *,
    precision: Precision,
    rounds: int,
    micro_batch_tokens: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Comparison]:
    """Measure the cases one after the other; the engines without sharing are the baseline.

    With sharing a micro-batch of `micro_batch_tokens` holds as many distinct tokens.

    Joins a process group of one, if the process has none.
    """
    if not torch.distributed.is_initialized():
        join_alone()
    section = ModelSection(path=model, dtype=precision)
    trains = [TrainSection(share_prefixes=mode, micro_batch_tokens=micro_batch_tokens) for mode in MODES]
    engines = {f"rayrlhf, {train.share_prefixes}": _engine(section, train) for train in trains}
    return [found for name in cases for found in _case(name, section, engines, rounds, progress)]


def bench_step(
    model: str, *, precision: Precision, rounds: int, progress: Callable[[str], None] = lambda _: None
) -> Comparison:
    """Measure whole steps with groups of 8.

    Prompts have 320 to 480 characters, about 100 tokens of SmolLM2, and responses up to 100 tokens.
    """
    with TemporaryDirectory() as folder:
        policy, reward = write_reward_model(model, Path(folder) / "reward")
        work = PPOWork(policy, reward, precision, STEP_PROMPTS, 100, 1, samples=8, characters=(320, 480))

        def speed(share_prefixes: SharePrefixes) -> float:
            return 3600 / in_new_process(run_ours, replace(work, share_prefixes=share_prefixes), "none").step

        contenders: dict[str, Callable[[], float]] = {mode: partial(speed, mode) for mode in MODES}
        title = f"whole step, {STEP_PROMPTS} groups of 8, reward model and reference, {model}, {precision}"
        return compare(title, "steps/h", contenders, rounds, progress)


def case_sequences(name: str) -> list[TokenSequence]:
    """Return the samples of a case, groups consecutive."""
    generator = np.random.default_rng(SEED)

    def draw(count: int) -> np.ndarray:
        return generator.integers(3, 256, count, dtype=np.int32)

    sequences = []
    for prompt, response, samples in CASES[name]:
        before = draw(prompt)
        for _ in range(samples):
            sequences.append(TokenSequence(np.concatenate([before, draw(response)]), len(before)))
            if name == "agent":
                before = np.concatenate([sequences[-1].token_ids, draw(prompt)])
    return sequences


def _engine(model: ModelSection, train: TrainSection) -> TrainEngine:
    engine = TrainEngine(TrainEngineSpec(model, frozenset({"lm"}), train, LEARNING_RATE))
    first = [TokenSequence(np.arange(3, 9, dtype=np.int32), 3)]
    batch, objective = _training(first, pairs=False)
    engine.update(batch, UpdatePlan([[[0]]]), objective)  # the optimizer's states are allocated in the first step
    return engine


def _case(
    name: str, model: ModelSection, engines: Mapping[str, TrainEngine], rounds: int, progress: Callable[[str], None]
) -> Iterator[Comparison]:
    sequences = case_sequences(name)
    tokens = sum(len(sequence.token_ids) for sequence in sequences)
    distinct = len(prefix_tree([sequence.token_ids for sequence in sequences]).token_ids)
    batch, objective = _training(sequences, pairs=name == "pairs")
    plain = PlainTrainer(model, sequences, torch.get_num_threads())
    where = f"{name}, {model.path}, {model.dtype}: {tokens:,} tokens, {distinct:,} distinct"
    grown: dict[str, list[float]] = {label: [] for label in engines}
    updates: dict[str, Callable[[], float]] = {
        label: partial(_update_speed, engine, batch, objective, grown[label]) for label, engine in engines.items()
    }
    yield compare(f"update, {where}", "tokens/s", {**updates, "plain torch": plain.speed}, rounds, progress)
    if all(map(min, grown.values())):
        held = {label: [tokens * GIB / size for size in sizes] for label, sizes in grown.items()}
        yield Comparison(f"memory of the update, {where}", "tokens/GiB", held)
    scores = {label: partial(_scoring_speed, engine, sequences, tokens) for label, engine in engines.items()}
    yield compare(f"scoring, {where}", "tokens/s", scores, rounds, progress)


def _training(sequences: Sequence[TokenSequence], *, pairs: bool) -> tuple[TrainingBatch, Objective]:
    lengths = np.array([sequence.response_length for sequence in sequences])
    shape = (len(sequences), int(lengths.max()))
    mask = np.arange(shape[1]) < lengths[:, None]
    if pairs:
        first = np.zeros(shape, dtype=np.bool_)
        first[::2, 0] = True
        reference = np.zeros(shape, dtype=np.float32)
        batch = TrainingBatch(sequences, {"action_mask": mask, PAIR_MASK: first, REFERENCE: reference}, group_size=2)
        return batch, DirectPreferenceObjective()
    old = np.full(shape, -1.0, dtype=np.float32)
    advantages = np.random.default_rng(SEED).standard_normal(shape).astype(np.float32)
    return TrainingBatch(sequences, {"old_logprobs": old, "advantages": advantages, "action_mask": mask}), PolicyObjective()


def _update_speed(engine: TrainEngine, batch: TrainingBatch, objective: Objective, grown: list[float]) -> float:
    with _growth(grown):
        started = time.perf_counter()
        engine.update(batch, UpdatePlan([[list(range(len(batch)))]]), objective)
        return sum(batch.lengths) / (time.perf_counter() - started)


@contextmanager
def _growth(found: list[float]) -> Iterator[None]:
    """Add the growth of the block's peak memory in bytes, 0 outside of Linux."""
    linux = sys.platform == "linux"
    if linux:
        ctypes.CDLL(None).malloc_trim(0)  # else the block would fill memory that an earlier one freed
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins again
    before = psutil.Process().memory_info().rss
    yield
    found.append(max(1.0, own_footprint().resident - before) if linux else 0.0)


def _scoring_speed(engine: TrainEngine, sequences: Sequence[TokenSequence], tokens: int) -> float:
    started = time.perf_counter()
    engine.score(sequences, frozenset({"logprobs"}))
    return tokens / (time.perf_counter() - started)
