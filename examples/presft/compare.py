"""Plain SFT, Pre-SFT, RFT at k = 4 and SFT on clean data, on the same prompts: accuracy, tokens sampled and time, over seeds.

RFT is verifier-free as Pre-SFT is: the plainly tuned model samples four responses to every prompt, and the one closest to the
other three (mean BLEU) replaces the original. Accuracy is the share of held-out prompts answered right, greedily and at
temperature 1, where a model shows how much of what it learned was wrong.

    python examples/presft/compare.py runs/presft-example --seeds 3
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from make_data import make

from rayrlhf.actors.connection import connected
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.pipelines import PreSFTConfig, RelabelSection
from rayrlhf.pipelines.presft.dataset import repair, write_dataset
from rayrlhf.pipelines.presft.presft_folder import Layout, RoundFolder
from rayrlhf.pipelines.presft.presft_steps import LabeledModel, relabel_pairs
from rayrlhf.pipelines.presft.quality import measure_quality
from rayrlhf.pipelines.presft.run_presft import Run, run_presft
from rayrlhf.pipelines.presft.selection import Cut
from rayrlhf.pipelines.presft.sft_configs import sft_config, tuned_model
from rayrlhf.storage.atomic import write_atomically
from rayrlhf.tuning.train_model import train_sft
from rayrlhf.tuning.training_result import read_result

HERE = Path(__file__).parent
EVERYTHING = Cut(101.0)
LONGEST = 64
"""Tokens that hold every prompt with its response."""
METHODS = ("plain SFT", "Pre-SFT", "RFT, k = 4", "SFT on clean data")


class Comparison:
    """One seed: the four ways in one Pre-SFT run folder and three further tunings beside it."""

    def __init__(self, folder: Path, seed: int, count: int, overrides: list[str]) -> None:
        """Make the data and read the example's configuration."""
        self.data = folder / "data"
        make(self.data, count, seed)
        own = [f"data.path={self.data / 'noisy.jsonl'}", f"quality.data.path={self.data / 'held_out.jsonl'}"]
        own += [f"run.root={folder}", "run.name=presft", f"run.seed={seed}"]
        self.config = load_config(PreSFTConfig, HERE / "presft.yaml", [*own, *overrides])
        self.layout = Layout(self.config.run.folder)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note how long a block takes."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started

    def run(self) -> dict[str, dict[str, float]]:
        """Return the figures of each method."""
        unmeasured = self.config.model_copy(update={"quality": None})
        with connected(None):
            with self.timed("Pre-SFT"):
                sheet = run_presft(unmeasured).datasheet
            with self.timed("RFT, k = 4"):
                rft_tokens = self.rft()
            with self.timed("SFT on clean data"):
                self.tune("clean", self.data / "clean.jsonl")
            plain = read_result(self.layout.tuned(0))
            assert plain is not None
            self.seconds["plain SFT"] = plain.seconds
            self.seconds["RFT, k = 4"] += plain.seconds  # It samples from the plainly tuned model.
            figures = {name: {"seconds": self.seconds[name], "tokens": 0.0} for name in METHODS}
            figures["Pre-SFT"]["tokens"] = sheet["rounds"][0]["tokens"]["total"]
            figures["RFT, k = 4"]["tokens"] = rft_tokens
            tuned = (self.layout.tuned(0), self.layout.tuned(1), self.beside("rft"), self.beside("clean"))
            Run(self.config, self.layout, None).prepare()
            for name, folder, label in zip(METHODS, tuned, ("plain", "presft", "rft", "clean"), strict=True):
                for temperature, column in ((1.0, "sampled"), (0.0, "greedy")):
                    figures[name][column] = self.accuracy(label, folder, temperature)
        figures["Pre-SFT"] |= self.selection()
        return figures

    def rft(self) -> int:
        """Resample every response, tune on the best of four, and return the tokens sampled."""
        folder = RoundFolder(self.layout.path.parent / "rft")
        relabel = RelabelSection(method="mbr", samples=4)
        model = LabeledModel("tuned", tuned_model(self.config, self.layout.tuned(0)))
        scores = self.layout.round(1).scores
        relabel_pairs(self.config, relabel, scores, folder.relabeled, EVERYTHING, model, 5, lambda _: None)
        repair(folder.relabeled, folder.repaired)
        write_dataset(folder.repaired, folder.dataset)
        self.tune("rft", folder.dataset)
        return sum(row["new_tokens"] for row in folder.relabeled.rows(["new_tokens"]))

    def tune(self, name: str, dataset: Path) -> None:
        """Tune the base model with the example's settings, beside the Pre-SFT run."""
        train_sft(sft_config(self.config, self.beside(name), dataset, None, longest=LONGEST))

    def beside(self, name: str) -> Path:
        """The folder of a tuning that Pre-SFT does not do."""
        return self.layout.path.parent / f"tuned-{name}"

    def accuracy(self, label: str, tuned: Path, temperature: float) -> float:
        """Share of held-out prompts that are answered right."""
        assert self.config.quality is not None
        quality = self.config.quality.model_copy(update={"temperature": temperature})
        config = self.config.model_copy(update={"quality": quality})
        model = LabeledModel(f"{label}-{temperature:g}", tuned_model(self.config, tuned))
        return float(measure_quality(config, self.layout, model, lambda _: None)["score"])

    def selection(self) -> dict[str, float]:
        """Precision and recall of the cut against the injected mistakes, and what the new responses are worth."""
        rows = [row | json.loads(row["columns"]) for row in self.layout.round(1).relabeled.rows()]
        struggling, bad = [row for row in rows if row["struggling"]], [row for row in rows if row["mistake"] != "none"]
        hit = [row for row in struggling if row["mistake"] != "none"]
        figures = {"precision": len(hit) / max(len(struggling), 1), "recall": len(hit) / len(bad)}
        replaced = [row for row in rows if row["decision"] == "replace"]
        figures["new responses right"] = sum(row["new_response"] == row["answer"] for row in replaced) / max(len(replaced), 1)
        for kind in ("systematic", "random"):
            of_kind = [row for row in bad if row["mistake"] == kind]
            figures[f"recall, {kind}"] = sum(row["struggling"] for row in of_kind) / len(of_kind)
        return figures


def table(seeds: list[dict[str, dict[str, float]]]) -> str:
    """Return the comparison as Markdown: mean over seeds, with the range where there are several."""
    lines = ["| | accuracy, sampled | accuracy, greedy | tokens sampled | seconds |", "|---|---|---|---|---|"]
    for name in METHODS:
        cells = []
        for column, form in (("sampled", "{:.1%}"), ("greedy", "{:.1%}"), ("tokens", "{:,.0f}"), ("seconds", "{:.0f}")):
            values = [seed[name][column] for seed in seeds]
            spread = f" ({form.format(min(values))} to {form.format(max(values))})" if len(set(values)) > 1 else ""
            cells.append(form.format(statistics.mean(values)) + spread)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    names = [name for name in seeds[0]["Pre-SFT"] if name not in ("sampled", "greedy", "tokens", "seconds")]
    means = [f"{name} {statistics.mean(seed['Pre-SFT'][name] for seed in seeds):.1%}" for name in names]
    return "\n".join([*lines, "", f"Selection of the injected mistakes: {', '.join(means)}."])


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description="Compare Pre-SFT with plain SFT, RFT and clean data.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("overrides", nargs="*", help="settings of presft.yaml to replace")
    given = parser.parse_args()
    seeds: list[Any] = []
    for seed in range(given.seeds):
        stored = given.folder / f"seed-{seed}" / "figures.json"
        if not stored.is_file():
            figures = Comparison(stored.parent, seed, given.count, given.overrides).run()
            write_atomically(stored, json.dumps(figures, indent=1))
        seeds.append(json.loads(stored.read_text(encoding="utf-8")))
        print(f"seed {seed}: {json.dumps(seeds[-1])}")
    print(table(seeds))


if __name__ == "__main__":
    main()
