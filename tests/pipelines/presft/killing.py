"""A scoring run that is slow enough to be killed, as a script and as stages that say which process they are in."""

import os
import sys
import time
from pathlib import Path

from rayrlhf.batch_inference.ingest import ingest_dataset
from rayrlhf.pipelines.presft.dataset import repair, write_dataset
from rayrlhf.pipelines.presft.presft_folder import Layout
from rayrlhf.pipelines.presft.presft_steps import LabeledModel, read_cut, relabel_pairs, score_pairs, select_pairs
from rayrlhf.pipelines.presft.probing import ProbeGenerator, ProbeScorer
from tests.pipelines.presft.runs import presft_config

PAUSE_SECONDS = 0.4
SETTINGS = ("probe.temperature=1.0", "select.rule=quantile", "select.value=0.4", "relabel.method=mbr", "relabel.samples=3")
ROWS = 160
HOLD = "hold"
"""File in the folder of a run: while it exists, a generator stops after `HOLD_AFTER` parts and cannot finish unkilled."""
HOLD_AFTER = 5


class SlowProber(ProbeGenerator):
    def __init__(self, folder, plan):
        note_process(folder, "generator")
        super().__init__(plan)
        self._hold, self._calls = folder / HOLD, 0

    def __call__(self, table):
        self._calls += 1
        time.sleep(PAUSE_SECONDS)
        while self._calls > HOLD_AFTER and self._hold.exists():
            time.sleep(0.05)
        return super().__call__(table)


class SlowScorer(ProbeScorer):
    def __init__(self, folder, probe, data, plan):
        note_process(folder, "scorer")
        super().__init__(probe, data, plan)

    def __call__(self, table):
        time.sleep(PAUSE_SECONDS)
        return super().__call__(table)


def note_process(folder, name):
    with (folder / f"{name}.pids").open("a") as file:
        file.write(f"{os.getpid()}\n")


def prepare(folder):
    config, layout = presft_config(folder, *SETTINGS, count=ROWS), Layout(folder / "run")
    ingest_dataset(config.data, layout.rows, layout.rejected, rows_per_part=16, tokenizer=None, longest=None)
    return config, layout


def main(folder):
    """Score, select, relabel and repair; run again, it goes on."""
    import ray

    config, layout = prepare(folder)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    model = LabeledModel("tuned", config.model)
    first = layout.round(1)
    score_pairs(config, layout.rows, first.scores, model, config.probe, 2, lambda _: time.sleep(PAUSE_SECONDS / 4))
    select_pairs(config, first.scores, first.selection)
    cut = read_cut(first.selection)
    relabel_pairs(config, config.relabel, first.scores, first.relabeled, cut, model, 3, lambda _: None)
    repair(first.relabeled, first.repaired)
    write_dataset(first.repaired, first.dataset)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
