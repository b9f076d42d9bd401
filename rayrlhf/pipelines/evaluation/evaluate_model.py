"""Evaluation of a model on one dataset: responses, scores, and means with confidence intervals.

It uses one process and one rollout engine, without Ray. Responses go to `answers/` as Parquet, numbers to `evaluation.json`. A
finished evaluation is read, not repeated. The same name with another configuration is rejected.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import comb
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayrlhf.config.data import DataSection
from rayrlhf.config.loading.load import dump_config, stored_differences
from rayrlhf.config.pipelines import EvaluateConfig
from rayrlhf.data.prompt_datasets import describe_columns, load_prompt_dataset, read_prompts
from rayrlhf.data.records import Float32, Prompt, Rollout, RolloutRequest, SampleKey
from rayrlhf.data.seeds import sample_seed
from rayrlhf.engines.rollout.common import RolloutSpec, check_room, context_length
from rayrlhf.engines.rollout.factory import check_rollout_backend
from rayrlhf.engines.scoring.judge_engine import JudgeEngine, check_judge
from rayrlhf.engines.scoring.reward_ensemble import RewardEnsemble
from rayrlhf.engines.scoring.reward_model import check_reward_models
from rayrlhf.environments.episodes import without_failed
from rayrlhf.environments.players.factory import build_player
from rayrlhf.environments.registry import check_environment
from rayrlhf.environments.transcript import transcript_lines
from rayrlhf.errors import AlarmError
from rayrlhf.models.load import load_architecture, load_tokenizer
from rayrlhf.models.start_check import check_generating_model, check_tokens
from rayrlhf.observe.cuda import check_vllm_device
from rayrlhf.observe.resampling import Interval, bootstrap_mean, distinct_share
from rayrlhf.observe.run_folder import check_run_folder, open_run
from rayrlhf.observe.samples import Line, Sample, SampleSink
from rayrlhf.pipelines.evaluation.rejection_sampling import KEPT, as_lines, kept_rows
from rayrlhf.rewards.functions import JUDGE_PART, BoundFunction, ScoringBatch, load_functions, required_columns
from rayrlhf.rewards.judgments import check_judge_columns, columns_read, judge_columns
from rayrlhf.rewards.probe import probe_functions
from rayrlhf.rewards.score import RewardBatch, run_functions, weighted_sum
from rayrlhf.storage.atomic import write_atomically
from rayrlhf.storage.notes import read_note

RESULT = "evaluation.json"
_DIFFERENCES = partial(stored_differences, EvaluateConfig)
ANSWERS = "answers"


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Result of an evaluation.

    Attributes:
        prompts: number of prompts.
        score: mean score with its bootstrap interval over prompts, of the mean per prompt.
        parts: the same for each part of the reward that applies to every response.
        distinct: share of distinct responses.
        samples: responses per prompt.
        pass_at: k -> pass@k; empty for one response per prompt.
        best_of: k -> score of the best of k responses; empty for one response per prompt.
        kept: responses kept for fine-tuning.
        failed: prompts excluded because the environment of a sample failed.
    """

    folder: Path
    prompts: int
    score: Interval
    parts: dict[str, Interval]
    distinct: float
    samples: int = 1
    pass_at: Mapping[int, Interval] = field(default_factory=dict)
    best_of: Mapping[int, Interval] = field(default_factory=dict)
    kept: int = 0
    failed: int = 0

    def lines(self) -> list[str]:
        """Return the result in words."""
        parts = [f"{name}: {interval}" for name, interval in self.parts.items()]
        tries = [f"pass@{k}: {interval}" for k, interval in self.pass_at.items()]
        tries += [f"best of {k}: {interval}" for k, interval in self.best_of.items()]
        kept = [f"kept: {self.kept} of {self.prompts * self.samples} answers, in {KEPT}"] if self.kept else []
        failed = f"; {self.failed} more failed in their environment" if self.failed else ""
        score = f"score over {self.prompts} prompts: {self.score}{failed}"
        return [score, *parts, *tries, f"distinct answers: {self.distinct:.0%}", *kept]


def check_evaluation(config: EvaluateConfig) -> str:
    """Check a configuration without loading the model, and return the plan in words.

    Raises:
        UserError: invalid data, reward functions, rollout backend, environment or lengths, or attention heads that the
            replica cannot divide.
    """
    functions = load_functions(config.reward)
    check_rollout_backend(config.rollout)
    if config.rollout.backend == "vllm":
        check_vllm_device("rollout.backend")
    if config.environment is not None:
        check_environment(config.environment)
    check_run_folder(config.run.folder, dump_config(config), _DIFFERENCES, folders=())
    prompts = load_evaluation_prompts(config, functions)
    slow = _probe(config, functions, prompts)
    read = None if config.environment is not None else columns_read(config.reward, functions)
    columns = describe_columns(config.data, prompts, read)
    counts = f"prompts: {len(prompts)} of {config.data.path}"
    return "\n".join([f"evaluation: {config.run.folder}", f"model: {config.model.path}", columns, counts, *slow])


def evaluate_model(config: EvaluateConfig) -> EvaluationResult:
    """Evaluate the model, or return the stored result of the same configuration.

    Raises:
        UserError: an invalid configuration, data or reward function; or the folder contains another evaluation.
        AlarmError: too many samples failed in their environment.
    """
    functions = load_functions(config.reward)
    prompts = load_evaluation_prompts(config, functions)
    with open_run(config.run.folder, dump_config(config), _DIFFERENCES, folders=()) as folder:
        if (folder.path / RESULT).is_file():
            return read_result(folder.path)
        _probe(config, functions, prompts)
        answered = _answer(config, prompts)
        complete = complete_prompts(config, prompts, list(answered.values()))
        repeated = [prompt for prompt in complete for _ in range(config.samples)]
        rollouts = [answered[_key(prompt, sample)] for prompt in complete for sample in range(config.samples)]
        batch = ScoringBatch.of_rollouts(repeated, rollouts)
        parts, _ = run_functions(functions, batch, timeout_seconds=config.reward.timeout_seconds)
        weights = {function.name: function.weight for function in functions}
        if config.reward.model is not None:
            ensemble = RewardEnsemble(config.reward.model)
            parts |= ensemble.parts(batch.whole_prompts, batch.responses)
            weights |= ensemble.weights
        if config.reward.judge is not None:
            judged = _judge(config, batch, rollouts)
            parts |= judged
            weights |= dict.fromkeys(judged, 0.0) | {JUDGE_PART: config.reward.judge.weight}
        rewards = weighted_sum(parts, weights, complete=False)
        rewards.scores[np.isnan([*parts.values()]).all(0)] = np.nan
        SampleSink(folder.path / ANSWERS).write(0, _samples(config, repeated, rollouts, rewards))
        weighted_sum(parts, weights)  # refuses an answer without any reward, after all are written
        kept = _keep(config, folder.path, repeated, rollouts, rewards.scores)
        return _write_result(config, folder.path, rollouts, rewards, kept, failed=len(prompts) - len(complete))


def _judge(config: EvaluateConfig, batch: ScoringBatch, rollouts: Sequence[Rollout]) -> dict[str, Float32]:
    """Return the judge's parts of a batch."""
    assert config.reward.judge is not None
    judge = JudgeEngine(config.reward.judge, config.run.seed)
    try:
        if config.reward.probe:
            judge.try_out()
        return judge.parts(batch, [rollout.key.prompt for rollout in rollouts])
    finally:
        judge.close()


def _probe(config: EvaluateConfig, functions: Sequence[BoundFunction], prompts: Sequence[Prompt]) -> list[str]:
    if config.environment is not None or not config.reward.probe:
        return []
    return probe_functions(functions, prompts, load_tokenizer(config.model))


def read_result(folder: Path) -> EvaluationResult:
    """Read the result of a finished evaluation."""
    stored = read_note(folder / RESULT, "remove it, and the same command writes it again")
    parts = {name: Interval(**values) for name, values in stored["parts"].items()}
    tries = {
        name: {int(k): Interval(**values) for k, values in stored.get(name, {}).items()} for name in ("pass_at", "best_of")
    }
    score = Interval(**stored["score"])
    return EvaluationResult(
        folder,
        stored["prompts"],
        score,
        parts,
        stored["distinct"],
        stored.get("samples", 1),
        **tries,
        kept=stored.get("kept", 0),
        failed=stored.get("failed", 0),
    )


def complete_prompts(config: EvaluateConfig, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Prompt]:
    """Return the prompts without a failed sample.

    A failed environment gives no score. The whole prompt is excluded, so that all prompts have equally many responses.

    Args:
        config: sets the share of samples that may fail.
        rollouts: P x samples, in any order.

    Raises:
        AlarmError: too many failed, or no prompt is left.
    """
    if config.environment is None:
        return list(prompts)
    list(without_failed([list(rollouts)], len(rollouts), config.environment))  # raises above the share
    reasons = {rollout.key.prompt: rollout.failure for rollout in rollouts if rollout.failure}
    kept = [prompt for prompt in prompts if prompt.id not in reasons]
    if not kept:
        raise AlarmError(f"a sample of every prompt failed in its environment; the first: {next(iter(reasons.values()))}")
    return kept


def transcripts(config: EvaluateConfig, rollouts: Sequence[Rollout]) -> list[list[Line] | None]:
    """Return the transcript of each rollout, or None without an environment."""
    if config.environment is None:
        return [None] * len(rollouts)
    tokenizer = load_tokenizer(config.model)
    return [transcript_lines(rollout, tokenizer) for rollout in rollouts]


def load_evaluation_prompts(config: EvaluateConfig, functions: Sequence[BoundFunction]) -> list[Prompt]:
    """Return the tokenized prompts; errors as `check_evaluation`."""
    context = context_length(config.rollout, load_architecture(config.model))
    longest = config.data.max_prompt_tokens or context - config.rollout.max_new_tokens
    check_room(context, config.data.max_prompt_tokens, config.rollout.max_new_tokens)
    rollout = config.rollout
    check_generating_model(
        config.model, rollout.backend, rollout.tensor_parallel_size, "rollout", rollout.pipeline_parallel_size
    )
    if config.reward.model is not None:
        check_reward_models(config.reward.model)
    data = DataSection(train=config.data, chat=config.data.chat, system_prompt=config.data.system_prompt)
    check_judge(config.reward.judge)
    tokenizer, needs = load_tokenizer(config.model), required_columns(functions) | judge_columns(config.reward.judge)
    prompts = load_prompt_dataset(config.data, data, tokenizer, longest, needs)
    check_judge_columns(config.reward.judge, prompts)
    check_tokens(config.model, tokenizer, (prompt.token_ids for prompt in prompts))
    return prompts


def _key(prompt: Prompt, sample: int) -> SampleKey:
    return SampleKey(0, prompt.id, sample)


def _answer(config: EvaluateConfig, prompts: Sequence[Prompt]) -> dict[SampleKey, Rollout]:
    """Generate `samples` responses per prompt."""
    engine = build_player(RolloutSpec(config.model, config.rollout, config.run.seed, config.environment))
    try:
        requests = [
            RolloutRequest(_key(prompt, sample), prompt.token_ids, sample_seed(config.run.seed, 0, prompt.id, sample), prompt)
            for prompt in prompts
            for sample in range(config.samples)
        ]
        engine.submit(requests, temperature=config.temperature, max_new_tokens=config.rollout.max_new_tokens)
        finished: list[Rollout] = []
        while engine.unfinished:
            finished += engine.poll(engine.unfinished)
    finally:
        engine.close()
    return {rollout.key: rollout for rollout in finished}


def _write_result(
    config: EvaluateConfig, folder: Path, rollouts: Sequence[Rollout], rewards: RewardBatch, kept: int, *, failed: int
) -> EvaluationResult:
    def per_prompt(values: Float32) -> Float32:
        return values.reshape(-1, config.samples)

    scores = per_prompt(rewards.scores)
    parts = {name: _present_mean(per_prompt(values)) for name, values in rewards.parts.items() if not np.isnan(values).all()}
    if JUDGE_PART in rewards.parts:
        missing = np.isnan(per_prompt(rewards.parts[JUDGE_PART]))
        parts[f"{JUDGE_PART}_missing"] = bootstrap_mean(missing.mean(1))
    chosen_by = None if config.best_by is None else per_prompt(rewards.parts[config.best_by])
    tries = powers_of_two(config.samples) if config.samples > 1 else []
    result = EvaluationResult(
        folder,
        len(scores),
        bootstrap_mean(scores.mean(1)),
        parts,
        distinct_share([rollout.text.strip() for rollout in rollouts]),
        config.samples,
        {k: bootstrap_mean(pass_at(scores, k, right_from=config.right_from)) for k in tries},
        {k: bootstrap_mean(best_of(scores, k, chosen_by=chosen_by)) for k in tries},
        kept,
        failed,
    )
    stored = asdict(result) | {"folder": str(folder)}
    write_atomically(folder / RESULT, json.dumps(stored, indent=2) + "\n")
    return result


def _present_mean(values: Float32) -> Interval:
    """Return the mean of a part [P, n] over prompts, without NaNs."""
    present = ~np.isnan(values)
    counts = present.sum(1)
    return bootstrap_mean(np.nan_to_num(values).sum(1)[counts > 0] / counts[counts > 0])


def _keep(
    config: EvaluateConfig, folder: Path, repeated: Sequence[Prompt], rollouts: Sequence[Rollout], scores: Float32
) -> int:
    """Write the kept responses, before the result that marks completion; return their number."""
    if config.keep is None:
        return 0
    written = dict(enumerate(read_prompts(config.data)))
    rows = kept_rows(repeated, rollouts, scores, config.keep, written, config.data)
    write_atomically(folder / KEPT, as_lines(rows))
    return len(rows)


def _samples(
    config: EvaluateConfig, repeated: Sequence[Prompt], rollouts: Sequence[Rollout], rewards: RewardBatch
) -> list[Sample]:
    conversations = transcripts(config, rollouts)
    return [
        Sample.of(
            rollout,
            prompt.text,
            float(rewards.scores[index]),
            version=0,
            parts={name: float(values[index]) for name, values in rewards.parts.items()},
            transcript=conversations[index],
        )
        for index, (prompt, rollout) in enumerate(zip(repeated, rollouts, strict=True))
    ]


def best_of(scores: ArrayLike, k: int, *, chosen_by: ArrayLike | None = None) -> NDArray[np.float64]:
    """Return the expected score of the best of k samples per prompt, without bias.

    The mean over all subsets of k of the n samples has a closed form: the sample of rank i in ascending order is the best of
    C(i - 1, k - 1) of the C(n, k) subsets. For scores of 0 or 1 this is pass@k, equation 1 of Chen et al. (2021).

    Args:
        scores: float [P, n], of n independent samples of P prompts.
        k: number of samples, 1 <= k <= n.
        chosen_by: float [P, n], the criterion of the best; the scores when not given. A sample with NaN is below all others.
            Ties go to the later sample, which is unbiased, because samples are independent.

    Returns:
        Float64 [P]; its mean over prompts is best-of-k.

    Raises:
        ValueError: k is not between 1 and n.
    """
    values = np.asarray(scores, dtype=np.float64)
    tries = values.shape[1]
    if not 1 <= k <= tries:
        raise ValueError(f"k {k}: expected 1 to {tries}, the number of tries")
    criterion = values if chosen_by is None else np.asarray(chosen_by, dtype=np.float64)
    order = np.argsort(np.where(np.isnan(criterion), -np.inf, criterion), axis=1, kind="stable")
    weights = np.array([comb(place, k - 1) / comb(tries, k) for place in range(tries)])
    expected: NDArray[np.float64] = np.take_along_axis(values, order, axis=1) @ weights
    return expected


def pass_at(scores: ArrayLike, k: int, *, right_from: float = 1.0) -> NDArray[np.float64]:
    """Return pass@k per prompt, float64 [P]; see `best_of`.

    Args:
        scores: float [P, n].
        k: number of samples, 1 <= k <= n.
        right_from: minimum score of a correct sample.

    Raises:
        ValueError: k is not between 1 and n.
    """
    return best_of(np.asarray(scores) >= right_from, k)


def powers_of_two(tries: int) -> list[int]:
    """Return the reported k: 1, 2, 4, ... below `tries`, and `tries`."""
    return [*(1 << bit for bit in range(tries.bit_length()) if 1 << bit < tries), tries]
