"""`rayrlhf quickstart`: PPO of a chat model on built-in word problems, with a summary."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.observe.resampling import bootstrap_mean, bootstrap_paired_difference, distinct_share
from rayrlhf.observe.samples import PART_PREFIX
from rayrlhf.observe.text_table import Comparison, before_after_table
from rayrlhf.ppo.run_recorder import read_evaluation
from rayrlhf.ppo.train_ppo import PPOResult, check_ppo, train_ppo

CONFIG = Path(__file__).with_name("quickstart.yaml")
ROWS_SHOWN = 6
EXACT = f"{PART_PREFIX}word_problems_exact"


def run_quickstart(overrides: Sequence[str], *, dry_run: bool = False) -> None:
    """Train, then print how the responses changed and where the files are."""
    config = load_config(PPOConfig, CONFIG, overrides)
    console = Console()
    if dry_run:
        console.print(check_ppo(config), markup=False, highlight=False)
        return
    result = train_ppo(config)
    before, after = (read_evaluation(result.folder, step) for step in (0, result.steps))
    console.print(before_after_table([_comparison(*pair) for pair in zip(before, after, strict=True)][:ROWS_SHOWN]))
    for line in summary(result, before, after):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def summary(result: PPOResult, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the run in a few lines: reward, accuracy, distinct responses, KL, cost, paths."""
    scores = [[row["score"] for row in rows] for rows in (before, after)]
    exact = [bootstrap_mean([row[EXACT] for row in rows]).mean for rows in (before, after)]
    steps = [row for row in read_metrics(result.folder) if "objective/kl" in row]
    folder = result.folder
    return [
        f"reward on {len(after)} held-out problems: {bootstrap_mean(scores[0])} -> {bootstrap_mean(scores[1])}, "
        f"change {bootstrap_paired_difference(scores[0], scores[1])}",
        f"exact `Answer: N`: {exact[0]:.1%} -> {exact[1]:.1%}; "
        f"distinct answers: {distinct_share([row['response'] for row in after]):.0%}; "
        f"largest KL to the start model: {max(row['objective/kl'] for row in steps):.1f} nats per response",
        f"{result.steps} PPO steps, {result.seconds / 60:.1f} minutes, peak memory {result.peak_gib:.1f} GiB in all processes",
        f"model: {folder / 'export'}   talk to it: rayrlhf chat {folder}",
        f"metrics: {folder / 'metrics.jsonl'}   curves: tensorboard --logdir {folder / 'tensorboard'}",
        f"answers: {folder / 'evaluation'}   samples: {folder / 'samples'}",
        f"timeline, for ui.perfetto.dev: {folder / 'trace.json'}",
    ]


def _comparison(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    return Comparison(before["prompt"], before["response"], after["response"], before["score"], after["score"])
