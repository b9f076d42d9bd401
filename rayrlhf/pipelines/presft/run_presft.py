"""A Pre-SFT run: tune, probe, select, relabel, and tune again from the base model.

Each step is done once and survives interruption.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rayrlhf.batch_inference.ingest import ingest_dataset
from rayrlhf.batch_inference.stage_resources import PartProgress
from rayrlhf.config.model import ModelSection
from rayrlhf.config.pipelines import PreSFTConfig
from rayrlhf.errors import UserError
from rayrlhf.models.model_path import MERGED
from rayrlhf.pipelines.presft.dataset import repair, write_dataset
from rayrlhf.pipelines.presft.datasheet import write_datasheet
from rayrlhf.pipelines.presft.dry_run import check_presft, needed_columns
from rayrlhf.pipelines.presft.presft_folder import Layout, open_presft
from rayrlhf.pipelines.presft.presft_report import write_report
from rayrlhf.pipelines.presft.presft_steps import (
    LabeledModel,
    low_score_warning,
    read_cut,
    relabel_pairs,
    score_pairs,
    select_pairs,
)
from rayrlhf.pipelines.presft.quality import measure_quality
from rayrlhf.pipelines.presft.sft_configs import sft_config, tuned_model
from rayrlhf.tuning.training_result import read_result

Step = Literal["score", "select", "relabel", "tune"]
STEPS: tuple[Step, ...] = ("score", "select", "relabel", "tune")


@dataclass(frozen=True, slots=True)
class PreSFTResult:
    """Result of a run; further results are in its folder.

    Attributes:
        folder: the run folder.
        dataset: repaired dataset of the last finished round, or None.
        export: model tuned on it, or None.
        datasheet: figures of the run, as in `datasheet.json`.
    """

    folder: Path
    dataset: Path | None
    export: Path | None
    datasheet: dict[str, Any]


def run_presft(config: PreSFTConfig, until: Step = "tune") -> PreSFTResult:
    """Run all rounds, or one step of the current round; finished steps are skipped.

    Args:
        config: the configuration.
        until: the step; `tune` finishes all rounds.

    Raises:
        UserError: an invalid configuration or dataset; too many unusable rows; a step without the results of earlier ones.
        ActorLostError: a process exceeded its restarts.
    """
    with _running(config) as run:
        numbers = range(1, config.run.rounds + 1)
        for number in numbers if until == "tune" else [run.current_round()]:
            run.round(number, until)
        return run.result()


def report_presft(config: PreSFTConfig) -> PreSFTResult:
    """Write `datasheet.json` and `report.html` of the finished steps.

    Raises:
        UserError: no scores yet.
    """
    layout = Layout(config.run.folder)
    if not layout.round(1).scores.sealed:
        raise UserError(f"{config.run.folder}: nothing to report yet; run `rayrlhf presft score` first")
    with open_presft(config):
        return Run(config, layout, _Silent()).result()


class _Silent:
    """Progress without output."""

    def rows(self, text: str, total: int) -> Callable[[int], None]:
        return lambda _: None

    def note(self, text: str) -> None:
        pass


@dataclass
class Run:
    """Steps of a run in its open folder."""

    config: PreSFTConfig
    layout: Layout
    progress: Any

    def prepare(self) -> None:
        """Read and check the datasets, before any expensive step."""
        tokenizer, longest = None, None
        config, layout = self.config, self.layout
        if self._needs_model():
            tokenizer, longest = _tokenizer_and_limit(config)
        size = config.pipeline.rows_per_part
        given = config.probe.response_field
        ingest_dataset(
            config.data,
            layout.rows,
            layout.rejected,
            rows_per_part=size,
            tokenizer=tokenizer,
            longest=longest,
            given_field=given,
            needs=needed_columns(config.relabel.verifier),
        )
        write_dataset(layout.rows, layout.dataset)
        if config.quality is not None:
            held_out, rejected = layout.held_out, layout.quality("rejected")
            if tokenizer is None:
                tokenizer, longest = _tokenizer_and_limit(config)
            ingest_dataset(
                config.quality.data,
                held_out,
                rejected,
                rows_per_part=size,
                tokenizer=tokenizer,
                longest=longest,
                needs=needed_columns(config.quality.verifier),
            )
            write_dataset(held_out, self._held_out_dataset())

    def current_round(self) -> int:
        """Return the first round without a repaired dataset, or the last."""
        numbers = range(1, self.config.run.rounds + 1)
        return next((number for number in numbers if not self.layout.round(number).repaired.sealed), numbers[-1])

    def round(self, number: int, until: Step) -> None:
        """Do one step of a round, or all steps for `tune`.

        `select` and `relabel` need the results of earlier steps; `score` tunes first if needed.
        """
        steps: dict[Step, Callable[[int], None]] = {
            "score": self.score,
            "select": self.select,
            "relabel": self.relabel,
            "tune": lambda this: self.tune(this, self.layout.round(this).dataset),
        }
        for step in STEPS if until == "tune" else [until]:
            steps[step](number)

    def score(self, number: int) -> None:
        """Tune if needed, then generate and score the probes."""
        config, layout = self.config, self.layout
        folder = layout.round(number)
        if folder.scores.sealed:
            return
        model = self._tuned(number - 1)
        rows = layout.round_rows(number)
        done = self.progress.rows(f"round {number}: scoring", rows.facts()["rows"])
        score_pairs(config, rows, folder.scores, model, config.probe, 2 * number, done)
        warning = low_score_warning(folder.scores.facts())
        if warning is not None:
            self.progress.note(f"round {number}: {warning}")

    def select(self, number: int) -> None:
        """Find the cut."""
        folder = self.layout.round(number)
        if folder.relabeled.indices():
            return
        facts = select_pairs(self.config, folder.scores, folder.selection)
        share = f"{facts['selected']} of {facts['of']} pairs struggle"
        self.progress.note(f"round {number}: {share} (BLEU below {facts['score']:.1f}, rule {facts['rule']})")

    def relabel(self, number: int) -> None:
        """Generate candidates, decide, and write the repaired dataset."""
        config, layout = self.config, self.layout
        folder = layout.round(number)
        cut = read_cut(folder.selection)
        done = self.progress.rows(f"round {number}: relabeling", folder.scores.facts()["rows"])
        model = None if config.reuses_probe or not config.relabels else self._tuned(number - 1)
        relabel_pairs(config, config.relabel, folder.scores, folder.relabeled, cut, model, 2 * number + 1, done)
        if not folder.repaired.sealed:
            repair(folder.relabeled, folder.repaired)
        write_dataset(folder.repaired, folder.dataset)

    def tune(self, number: int, dataset: Path) -> None:
        """Tune the base model on a dataset, and measure its quality."""
        from rayrlhf.tuning.merge import exported_model
        from rayrlhf.tuning.train_model import train_sft

        config, layout = self.config, self.layout
        folder = layout.tuned(number)
        if read_result(folder) is None:
            held_out = self._held_out_dataset() if config.quality is not None else None
            train_sft(sft_config(config, folder, dataset, held_out, longest=self._longest()))
        if config.model.lora is not None and not (folder / MERGED).is_dir():
            exported_model(folder, merge=True)
        if config.quality is not None:
            model = LabeledModel(layout.label(number), tuned_model(config, folder))
            done = self.progress.rows(f"{model.label}: held-out answers", layout.held_out.facts()["rows"])
            measure_quality(config, layout, model, done)

    def result(self) -> PreSFTResult:
        """Write datasheet and report, and return the result."""
        layout = self.layout
        sheet = write_datasheet(self.config, layout)
        write_report(self.config, layout, sheet)
        finished = [number for number in range(1, self.config.run.rounds + 1) if layout.round(number).dataset.is_file()]
        export = Path(tuned_model(self.config, layout.tuned(finished[-1])).path) if finished else None
        return PreSFTResult(
            layout.path,
            layout.round(finished[-1]).dataset if finished else None,
            export if export is not None and export.is_dir() else None,
            sheet,
        )

    def _tuned(self, number: int) -> LabeledModel | None:
        """Return the model that a round probes; tune it if needed."""
        config, layout = self.config, self.layout
        if number == 0 and config.probe.model is not None:
            return LabeledModel("given", config.probe.model)
        if config.probe.response_field is not None:
            return None
        self.tune(number, layout.dataset if number == 0 else layout.round(number).dataset)
        return LabeledModel(layout.label(number), tuned_model(config, layout.tuned(number)))

    def _needs_model(self) -> bool:
        return self.config.probe.response_field is None

    def _held_out_dataset(self) -> Path:
        return self.layout.held_out.path / "dataset.parquet"

    def _longest(self) -> int:
        """Return the maximum tokens of a sample in any dataset of the run."""
        facts = self.layout.rows.facts()
        if "longest_prompt" not in facts:
            return _tokenizer_and_limit(self.config)[1]
        return int(facts["longest_prompt"]) + max(int(facts["longest_response"]), self.config.generate.max_new_tokens)


@contextmanager
def _running(config: PreSFTConfig) -> Iterator[Run]:
    from rayrlhf.actors.connection import connected
    from rayrlhf.observe.live import LiveView

    check_presft(config)
    view = LiveView(f"rayrlhf presft {config.run.name}", live=False)
    with open_presft(config):
        run = Run(config, Layout(config.run.folder), PartProgress(view))
        with view.wait("reading the dataset"):
            run.prepare()
        with connected(config.pipeline.address):
            yield run


def _tokenizer_and_limit(config: PreSFTConfig) -> tuple[Any, int]:
    """Return the tokenizer, and the maximum tokens of prompt and response."""
    from rayrlhf.config.rollout import RolloutSection
    from rayrlhf.engines.rollout.common import context_length
    from rayrlhf.models.load import load_architecture, load_tokenizer

    model: ModelSection = config.model
    section = RolloutSection(max_model_length=config.generate.max_model_length)
    return load_tokenizer(model), context_length(section, load_architecture(model))
