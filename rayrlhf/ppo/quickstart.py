"""`rayrlhf quickstart`: PPO or another algorithm on built-in word problems."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.loading.presets import RECIPES
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError
from rayrlhf.observe.metric_names import SCORE_ERROR
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.observe.progress import NORMAL_95, SCORE
from rayrlhf.observe.resampling import bootstrap_mean, bootstrap_paired_difference, distinct_share
from rayrlhf.observe.samples import PART_PREFIX
from rayrlhf.observe.text_table import Comparison, before_after_table
from rayrlhf.plugins import did_you_mean
from rayrlhf.ppo.run_recorder import read_evaluation
from rayrlhf.ppo.train_ppo import PPOResult, check_ppo, train_ppo

CONFIG = Path(__file__).with_name("quickstart.yaml")
ROWS_SHOWN = 6
EXACT = f"{PART_PREFIX}worked_answer_exact"
PPO = "ppo"
ALGORITHMS = tuple(name for name, tree in RECIPES.items() if not tree.get("critic", {}).get("pretrain_steps"))
"""Presets that learn within the steps of the quickstart."""


def quickstart_config(overrides: Sequence[str], algorithm: str = PPO) -> PPOConfig:
    """Return the configuration of the quickstart under an algorithm.

    Other algorithms than PPO replace the sections `critic` and `algorithm` by those of their preset. Their KL coefficient is at
    most PPO's.

    Raises:
        UserError: an unknown algorithm, or a mistake in the overrides.
    """
    config = load_config(PPOConfig, CONFIG, overrides if algorithm == PPO else ())
    if algorithm == PPO:
        return config
    if algorithm not in ALGORITHMS:
        reason = "its critic is pretrained for more steps than the quickstart has; " if algorithm in RECIPES else ""
        expected = f"expected {', '.join(ALGORITHMS)}{did_you_mean(algorithm, ALGORITHMS)}"
        raise UserError(f"--algorithm {algorithm}: {reason}{expected}")
    coefficient = min(config.algorithm.kl.coefficient, RECIPES[algorithm]["algorithm"]["kl"]["coefficient"])
    chosen = [
        f"preset={algorithm}",
        f"run.name={config.run.name}-{algorithm.replace('+', 'p')}",
        f"algorithm.kl.coefficient={coefficient}",
    ]
    return load_config(PPOConfig, CONFIG, [*chosen, *overrides], without=("critic", "algorithm"))


def run_quickstart(overrides: Sequence[str], *, algorithm: str = PPO, dry_run: bool = False) -> None:
    """Train, then print the curve, how the responses changed and where the files are."""
    config = quickstart_config(overrides, algorithm)
    if not config.evaluation.enabled:
        raise UserError("evaluation.enabled false: the quickstart compares held-out answers; use `rayrlhf ppo` without them")
    console = Console()
    if dry_run:
        console.print(check_ppo(config), markup=False, highlight=False)
        return
    result = train_ppo(config)
    before, after = (read_evaluation(result.folder, step) for step in (0, result.steps))
    console.print(before_after_table([_comparison(*pair) for pair in zip(before, after, strict=True)][:ROWS_SHOWN]))
    console.print(curve_table(result.folder, kl=config.needs_reference))
    for line in summary(result, before, after, kl=config.needs_reference):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def curve_table(folder: Path, *, kl: bool = True) -> Table:
    """Return a table of sampled and held-out scores, with 95 % intervals over prompts.

    Args:
        folder: of the run.
        kl: the run measures its KL to the start model.
    """
    table = Table("step", "sampled score", "exact", "KL, nats", "held-out score", "held-out exact", title="Learning curve")
    rows: dict[int, dict[str, Any]] = {}
    for row in read_metrics(folder):
        rows.setdefault(row["step"], {}).update(row)
    for step, row in sorted(rows.items()):
        cells = [str(step), "", "", "", "", ""]
        if SCORE in row:
            error = f" ± {NORMAL_95 * row[SCORE_ERROR]:.3f}" if SCORE_ERROR in row else ""
            cells[1:4] = f"{row[SCORE]:.3f}{error}", _share(row.get(EXACT)), f"{row['objective/kl']:.1f}" if kl else "-"
        if held_out := read_evaluation(folder, step):
            cells[4:] = str(bootstrap_mean([answer["score"] for answer in held_out])), _exact(held_out)
        table.add_row(*cells)
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _exact(answers: Sequence[Mapping[str, Any]]) -> str:
    """Return the share of exact answers; "-" where other reward functions are configured."""
    values = [answer[EXACT] for answer in answers if answer.get(EXACT) is not None]
    return f"{bootstrap_mean(values).mean:.1%}" if values else "-"


def summary(
    result: PPOResult, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], *, kl: bool = True
) -> list[str]:
    """Return the run in a few lines: reward, accuracy, distinct responses, KL, cost, paths.

    Args:
        result: of the run.
        before: held-out answers of the start model.
        after: those of the trained model.
        kl: the run measures its KL to the start model.
    """
    scores = [[row["score"] for row in rows] for rows in (before, after)]
    steps = [row for row in read_metrics(result.folder) if "objective/kl" in row]
    folder = result.folder
    largest = f"{max(row['objective/kl'] for row in steps):.1f} nats per response" if kl else "not measured"
    return [
        f"reward on {len(after)} held-out problems: {bootstrap_mean(scores[0])} -> {bootstrap_mean(scores[1])}, "
        f"change {bootstrap_paired_difference(scores[0], scores[1])}",
        f"right and ended there: {_exact(before)} -> {_exact(after)}; "
        f"distinct answers: {distinct_share([row['response'] for row in after]):.0%}; "
        f"largest KL to the start model: {largest}",
        f"{result.steps} PPO steps, {result.seconds / 60:.1f} minutes, peak memory {result.peak_gib:.1f} GiB in all processes",
        f"model: {folder / 'export'}   talk to it: rayrlhf chat {folder}",
        f"metrics: {folder / 'metrics.jsonl'}   curves: tensorboard --logdir {folder / 'tensorboard'}",
        f"answers: {folder / 'evaluation'}   samples: {folder / 'samples'}",
        f"timeline, for ui.perfetto.dev: {folder / 'trace.json'}",
    ]


def _comparison(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    return Comparison(before["prompt"], before["response"], after["response"], before["score"], after["score"])
