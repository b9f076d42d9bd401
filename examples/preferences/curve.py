"""Gold and proxy reward over the evaluations of PPO, the step to stop at, and the accuracy of both reward models.

    python examples/preferences/curve.py runs/preferences

The proxy is the reward model that PPO learns from, the gold one was trained on other rows (Gao et al. 2023, "Scaling Laws for
Reward Model Overoptimization"). Both are normalized to a standard deviation of 1. Half of the held-out prompts choose the step;
the other half measure it, because the best of several steps is too good on the prompts that chose it. Writes `curve.json` and
`curve.html` to the folder of the chain.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayrlhf.config.data import DatasetSection
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.tuning import RewardTrainingConfig
from rayrlhf.data.dataset_rows import open_rows
from rayrlhf.engines.scoring.reward_ensemble import MODEL_PART
from rayrlhf.engines.scoring.reward_model import RewardModelEngine
from rayrlhf.errors import UserError
from rayrlhf.models.model_path import EXPORT
from rayrlhf.observe.closing import EVALUATIONS
from rayrlhf.observe.html.charts import lines
from rayrlhf.observe.html.page import Chart, Paragraph, write_page
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.observe.resampling import Interval, bootstrap_mean, bootstrap_paired_difference, wins
from rayrlhf.observe.samples import PART_PREFIX, read_samples
from rayrlhf.storage.atomic import write_atomically

Values = NDArray[np.float64]


class Scores(NamedTuple):
    """Rewards [P] of the same prompts after a number of PPO steps; step 0 is the SFT model."""

    proxy: Values
    gold: Values


class Pairs(NamedTuple):
    """Numbers [N] of the better and the worse answers of N pairs."""

    chosen: Values
    rejected: Values


@dataclass(frozen=True)
class Point:
    """One evaluation.

    Attributes:
        kl: nats per sampled response of that step; None at step 0.
        tokens: mean tokens of the held-out responses.
        win_rate: see `Stop.win_rate`, here over all prompts.
    """

    step: int
    kl: float | None
    tokens: float
    proxy: Interval
    gold: Interval
    win_rate: Interval


@dataclass(frozen=True)
class Accuracy:
    """Shares of held-out pairs in the right order.

    Attributes:
        proxy: of the proxy reward model.
        gold: of the gold reward model.
        rule: of the rule that prefers the longer, or shorter, answer.
        above_rule: proxy minus rule, over the same pairs.
    """

    pairs: int
    proxy: Interval
    gold: Interval
    prefers: str
    rule: Interval
    above_rule: Interval


@dataclass(frozen=True)
class Stop:
    """The step with the largest gold reward, measured on prompts that did not choose it.

    Attributes:
        last: number of the last step.
        win_rate: share of prompts whose response the gold model prefers to that of SFT; equal rewards count as half.
        last_win_rate: the same of the last step.
        gold_change: gold reward of the last step minus that of the stop.
        proxy_change: the same of the proxy reward.
    """

    step: int
    last: int
    win_rate: Interval
    last_win_rate: Interval
    gold_change: Interval
    proxy_change: Interval

    @property
    def overoptimized(self) -> bool:
        """True if the proxy reward rises after the stop and the gold reward falls, beyond their intervals."""
        return self.gold_change.high < 0 < self.proxy_change.low


def measure_accuracy(proxy: Pairs, gold: Pairs, train_lengths: Pairs, held_out_lengths: Pairs) -> Accuracy:
    """Return the accuracy of both reward models and of the length rule.

    Args:
        proxy: rewards of the held-out pairs; equal rewards count as wrong.
        gold: the same of the gold model.
        train_lengths: of the training pairs of the proxy, which choose the rule.
        held_out_lengths: equal lengths count as half.
    """
    longer = wins(*train_lengths).mean() >= 0.5
    rule = wins(*held_out_lengths) if longer else 1 - wins(*held_out_lengths)
    right = proxy.chosen > proxy.rejected
    return Accuracy(
        len(rule),
        bootstrap_mean(right),
        bootstrap_mean(gold.chosen > gold.rejected),
        "longer" if longer else "shorter",
        bootstrap_mean(rule),
        bootstrap_paired_difference(rule, right),
    )


def choose_stop(curve: Mapping[int, Scores]) -> Stop:
    """Choose the step on the prompts of even number, and measure it on the others.

    Args:
        curve: step -> rewards of at least two prompts; has step 0.
    """
    last = max(curve)
    step = max(curve, key=lambda one: (curve[one].gold[::2].mean(), -one))
    judged = {one: Scores(*(values[1::2] for values in curve[one])) for one in (0, step, last)}
    return Stop(
        step,
        last,
        bootstrap_mean(wins(judged[step].gold, judged[0].gold)),
        bootstrap_mean(wins(judged[last].gold, judged[0].gold)),
        bootstrap_paired_difference(judged[step].gold, judged[last].gold),
        bootstrap_paired_difference(judged[step].proxy, judged[last].proxy),
    )


def verdict(stop: Stop) -> str:
    """Return where to stop and why, in words."""
    after = f"gold {stop.gold_change}, proxy {stop.proxy_change}"
    if stop.step == stop.last:
        return f"stop at step {stop.step}, the last one: the gold reward is largest there, and more steps may add to it"
    found = "over-optimization" if stop.overoptimized else "no over-optimization beyond the intervals"
    return f"stop at step {stop.step}: {found} from there to step {stop.last} ({after})"


def point(step: int, scores: Scores, sft: Scores, tokens: float, kl: float | None) -> Point:
    """Return the point of the curve at a step; `sft` has the rewards of step 0."""
    win_rate = bootstrap_mean(wins(scores.gold, sft.gold))
    return Point(step, kl, tokens, bootstrap_mean(scores.proxy), bootstrap_mean(scores.gold), win_rate)


def table(points: Sequence[Point]) -> list[str]:
    """Return the curve as lines of text."""
    head = f"{'step':>4}  {'KL':>6}  {'tokens':>6}  {'proxy':^23}  {'gold':^23}  {'win rate against SFT':^23}"
    rows = [
        f"{one.step:>4}  {'-' if one.kl is None else f'{one.kl:.2f}':>6}  {one.tokens:>6.1f}  {one.proxy!s:>23}  "
        f"{one.gold!s:>23}  {one.win_rate!s:>23}"
        for one in points
    ]
    return [head, *rows]


class Chain:
    """The finished chain of a folder, with its held-out pairs and both reward models.

    Attributes:
        curve: step -> rewards of the held-out answers.
        points: the same as means with intervals, by step.
        accuracy: of the reward models.
    """

    def __init__(self, folder: Path) -> None:
        """Read the run and score its held-out answers with the gold model.

        Raises:
            UserError: a stage is missing or has no model or evaluations.
        """
        config = load_config(PPOConfig, folder / "ppo" / "config.yaml")
        proxy_config = load_config(RewardTrainingConfig, folder / "proxy" / "config.yaml")
        answers = read_samples(folder / "ppo" / EVALUATIONS)
        section = config.reward.model
        if section is None or config.data.evaluation is None or not answers:
            raise UserError(f"{folder / 'ppo'}: expected PPO with a reward model and with evaluations")
        self._held_out = _rows(config.data.evaluation)
        models = (section.model.model_copy(update={"path": str(folder / name / EXPORT)}) for name in Scores._fields)
        proxy, gold = (RewardModelEngine(section.model_copy(update={"model": model})) for model in models)
        train = _rows(proxy_config.data.train)
        self.accuracy = measure_accuracy(self._judged(proxy), self._judged(gold), _lengths(train), _lengths(self._held_out))
        steps: dict[int, list[dict[str, Any]]] = {}
        for answer in answers:
            steps.setdefault(answer["step"], []).append(answer)
        self.curve = {step: self._scores(gold, own) for step, own in steps.items()}
        kl = {row["step"]: row["objective/kl"] for row in read_metrics(folder / "ppo") if row.get("objective/kl") is not None}
        self.points = [
            point(step, self.curve[step], self.curve[0], float(np.mean([one["length"] for one in own])), kl.get(step))
            for step, own in sorted(steps.items())
        ]

    def _judged(self, engine: RewardModelEngine) -> Pairs:
        """Return the rewards of the held-out pairs."""
        prompts = [row["prompt"] for row in self._held_out]
        return Pairs(*(engine.score(prompts, _answers(self._held_out, name)).astype(np.float64) for name in Pairs._fields))

    def _scores(self, gold: RewardModelEngine, answers: Sequence[Mapping[str, Any]]) -> Scores:
        proxy = np.array([answer[PART_PREFIX + MODEL_PART] for answer in answers], np.float64)
        prompts = [self._held_out[answer["prompt_id"]]["prompt"] for answer in answers]
        return Scores(proxy, gold.score(prompts, [answer["response"] for answer in answers]).astype(np.float64))


def _rows(section: DatasetSection) -> list[dict[str, Any]]:
    """Return the rows of a file of `make_rows.py`."""
    return [row for part in open_rows(section).slices for _, rows in part.chunks() for row in rows]


def _answers(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    return [row[name][0]["content"] for row in rows]


def _lengths(rows: Sequence[Mapping[str, Any]]) -> Pairs:
    """Return the characters of the answers."""
    return Pairs(*(np.array(list(map(len, _answers(rows, name))), np.float64) for name in Pairs._fields))


def report(folder: Path) -> list[str]:
    """Write `curve.json` and `curve.html`, and return the result in words.

    Raises:
        UserError: see `Chain`.
    """
    chain = Chain(folder)
    stop, accuracy, points = choose_stop(chain.curve), chain.accuracy, chain.points
    found = {"accuracy": asdict(accuracy), "curve": [asdict(one) for one in points], "stop": asdict(stop)}
    write_atomically(folder / "curve.json", json.dumps(found, indent=1) + "\n")
    text = [
        f"accuracy on {accuracy.pairs} held-out pairs: proxy {accuracy.proxy}, gold {accuracy.gold}",
        f"rule that prefers the {accuracy.prefers} answer: {accuracy.rule}; proxy minus rule: {accuracy.above_rule}",
        *table(points),
        verdict(stop),
        f"win rate against SFT by the gold model, on the prompts that did not choose the step: {stop.win_rate} at step "
        f"{stop.step}, {stop.last_win_rate} at step {stop.last}",
    ]
    series = {name: ([one.step for one in points], [getattr(one, name).mean for one in points]) for name in Scores._fields}
    chart = Chart(lines(series, title="Gold and proxy reward", x="PPO steps", y="reward, standard deviations"), text[-2])
    shown = [Paragraph(line) for line in (*text[:2], text[-1])]
    write_page(folder / "curve.html", "Preferences", f"{folder}, {len(chain.curve[0].gold)} held-out prompts", [chart, *shown])
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Report the gold reward over the evaluations of PPO.")
    parser.add_argument("folder", type=Path, help="The folder of a finished chain.")
    try:
        print("\n".join(report(parser.parse_args().folder)))
    except UserError as error:
        parser.error(str(error))
