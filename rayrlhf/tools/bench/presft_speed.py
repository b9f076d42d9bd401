"""Benchmarks of Pre-SFT: scoring, generation, and memory of a million rows.

Scoring is compared with a plain multiprocessing loop, generation with plain vLLM. Speeds are measured from the first completed
part (or chunk) to the last, so that startup time counts for neither side.
"""

import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from rayrlhf.batch_inference.generation import GenerationPlan
from rayrlhf.batch_inference.ingest import GIVEN
from rayrlhf.batch_inference.part_pipeline import Limits, Pool, run_pipeline
from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.batch_inference.source import row_schema
from rayrlhf.batch_inference.stage_resources import stage_resources
from rayrlhf.config.batch_inference import GenerateSection, PairsSection, PipelineSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.pipelines import ProbeSection
from rayrlhf.config.section import GIB
from rayrlhf.observe.memory import PeakMemory
from rayrlhf.pipelines.presft.probing import ProbeGenerator, ProbeScorer, given_probes
from rayrlhf.tools.bench.paired import Comparison, Contender, compare

ROWS_PER_PART = 4096
GENERATED_PER_PART = 256
WORDS = [
    first + second for first in ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti") for second in ("do", "fa", "go", "n", "s")
]
LIMITS = Limits(0, 600.0)
Texts = list[tuple[str, str]]


def synthetic_pairs(count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yield (hypothesis, reference) pairs of 20 to 60 words, about 80 % of them equal."""
    draw = random.Random(seed)
    for _ in range(count):
        reference = draw.choices(WORDS, k=draw.randrange(20, 61))
        hypothesis = [word if draw.random() < 0.8 else draw.choice(WORDS) for word in reference]
        yield " ".join(hypothesis) + ".", " ".join(reference) + "."


def write_rows(folder: PartFolder, count: int, rows_per_part: int = ROWS_PER_PART) -> None:
    """Write synthetic pairs as part files for scoring, with hypotheses as given responses."""
    import pyarrow as pa

    pairs, first, index = synthetic_pairs(count), 0, 0
    while batch := list(islice(pairs, rows_per_part)):
        rows = [
            {
                "row": first + place,
                "source": first + place,
                "prompt": f"number {first + place}",
                "response": reference,
                "columns": json.dumps({GIVEN: hypothesis}),
            }
            for place, (hypothesis, reference) in enumerate(batch)
        ]
        folder.write(index, pa.Table.from_pylist(rows, schema=row_schema()))
        first, index = first + len(batch), index + 1
    folder.seal({"rows": count})


class SteadySpeed:
    """Rows per second from the first report to the last."""

    def __init__(self) -> None:
        """Start without reports."""
        self._first: float | None = None
        self._last = 0.0
        self._rows = 0

    def done(self, rows: int) -> None:
        """Add a report of completed rows; the first report only starts the clock."""
        now = time.perf_counter()
        if self._first is None:
            self._first = now
        else:
            self._rows += rows
        self._last = now

    @property
    def value(self) -> float:
        """Rows per second."""
        assert self._first is not None
        return self._rows / (self._last - self._first)


def bench_scoring(*, rows: int, rounds: int, progress: Callable[[str], None]) -> Comparison:
    """Compare our scoring with `multiprocessing.Pool` over sacrebleu.

    Ours reads and writes Parquet on Ray Data; the pool has its texts in memory.
    """
    import ray

    cpus = int(ray.cluster_resources()["CPU"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = PartFolder(folder / "rows")
        write_rows(source, rows)
        pairs = list(synthetic_pairs(rows))
        chunks = [pairs[start : start + ROWS_PER_PART] for start in range(0, rows, ROWS_PER_PART)]
        targets = (PartFolder(folder / f"scores-{number}") for number in range(rounds))
        contenders: dict[str, Contender] = {
            "multiprocessing over sacrebleu": partial(_plain_scoring, chunks, cpus),
            "rayrlhf presft score": lambda: _score(source, next(targets), cpus),
        }
        title = f"BLEU of {rows:,} pairs on {cpus} cores"
        return compare(title, "rows/s", contenders, rounds, progress)


def bench_generation(model: str, *, prompts: int, new_tokens: int, rounds: int, progress: Callable[[str], None]) -> Comparison:
    """Compare the generation stage with plain vLLM, in a new engine for each run.

    Both have the same prompts, settings and limits.
    """
    import ray

    from rayrlhf.engines.rollout.common import rollout_environment

    generate = GenerateSection(max_new_tokens=new_tokens, max_concurrent=64, memory_gib=1.0)
    data = PairsSection(path="bench", chat=False)
    plan = GenerationPlan("bench", ModelSection(path=model), generate, data, 0, 0, 1, 0.0)
    resources = stage_resources(PipelineSection(), generate, ray.cluster_resources()["CPU"], 0.0, generating=True)
    environment = rollout_environment(plan.rollout(), threads=resources.generator_threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = PartFolder(folder / "rows")
        write_rows(source, prompts, rows_per_part=GENERATED_PER_PART)
        pool = Pool("probe", ProbeGenerator, (plan,), 1, resources.generator_cpus, environment=environment)
        targets = (PartFolder(folder / f"probed-{number}") for number in range(rounds))

        def ours() -> float:
            speed = SteadySpeed()
            run_pipeline(source, next(targets), [pool], LIMITS, speed.done)
            return speed.value

        def plain() -> float:
            actor = ray.remote(PlainVLLM).options(num_cpus=1, runtime_env={"env_vars": environment}).remote(plan)
            try:
                return float(ray.get(actor.speed.remote([row["prompt"] for row in source.rows(["prompt"])])))
            finally:
                ray.kill(actor)

        title = f"greedy responses of {new_tokens} tokens at most to {prompts:,} prompts, {model}"
        return compare(title, "rows/s", {"plain vLLM": plain, "rayrlhf generation stage": ours}, rounds, progress)


class PlainVLLM:
    """vLLM's own `LLM.generate` over all prompts at once, with the settings of our engine."""

    def __init__(self, plan: GenerationPlan) -> None:
        """Start vLLM."""
        from vllm import LLM

        from rayrlhf.models.load import resolve_dtype
        from rayrlhf.models.model_path import resolve_path

        self._limit = plan.generate.max_new_tokens
        self._engine = LLM(
            model=resolve_path(plan.model),
            dtype=str(resolve_dtype(plan.model.dtype)).removeprefix("torch."),
            max_num_seqs=plan.generate.max_concurrent,
            kv_cache_memory_bytes=int(plan.generate.memory_gib * GIB),
            enforce_eager=True,
            enable_chunked_prefill=False,
            disable_log_stats=True,
        )

    def speed(self, prompts: list[str]) -> float:
        """Return rows per second."""
        from vllm import SamplingParams

        started = time.perf_counter()
        self._engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=self._limit), use_tqdm=False)
        return len(prompts) / (time.perf_counter() - started)


def million_rows(rows: int, progress: Callable[[str], None]) -> tuple[float, float]:
    """Score synthetic rows; returns peak memory of all processes in GiB, and rows per second."""
    import ray

    with tempfile.TemporaryDirectory() as name:
        source, target = PartFolder(Path(name) / "rows"), PartFolder(Path(name) / "scores")
        progress(f"writing {rows:,} rows")
        write_rows(source, rows)
        progress("scoring them")
        with PeakMemory() as memory:
            speed = _score(source, target, int(ray.cluster_resources()["CPU"]))
        return memory.peak_bytes / GIB, speed


def _score(source: PartFolder, target: PartFolder, cpus: int) -> float:
    probe, data = ProbeSection(response_field="answer"), PairsSection(path="bench")
    resources = stage_resources(PipelineSection(), GenerateSection(), float(cpus), 0.0, generating=False)
    scorer = Pool("score", ProbeScorer, (probe, data, None), resources.scorers, resources.scorer_cpus)
    speed = SteadySpeed()
    run_pipeline(source, target, [given_probes, scorer], LIMITS, speed.done)
    return speed.value


def _plain_scoring(chunks: list[Texts], processes: int) -> float:
    speed = SteadySpeed()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for rows in pool.imap_unordered(_score_chunk, chunks):
            speed.done(len(rows))
    return speed.value


def _score_chunk(chunk: Texts) -> list[float]:
    metric = _metric()
    return [metric.sentence_score(hypothesis, [reference]).score for hypothesis, reference in chunk]


@cache
def _metric() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)
