"""The chain of `examples/icl`: what it claims of its four models, over three seeds (by hand: `-m nightly -s`)."""

import itertools
import json
from pathlib import Path

import pytest

from rayrlhf.config.pipelines import ChainConfig
from rayrlhf.pipelines.chain.run_chain import plan_chain, run_chain
from tests.examples.chains import seeded_chain

ROOT = Path(__file__).parents[2]


def chain_of(seed: int, root: Path) -> ChainConfig:
    """The chain with other start weights, other data and other draws."""
    return seeded_chain(ROOT / "examples" / "icl" / "chain.yaml", seed, root, "builtin:tiny?", "builtin:mappings?")


def points_of(folder: Path) -> dict[tuple[str, str, int], dict[str, float]]:
    return {(point["model"], point["ablation"], point["k"]): point for point in json.loads((folder / "curve.json").read_text())}


def test_every_stage_of_the_chain_is_what_its_command_reads(tmp_path: Path) -> None:
    planned = plan_chain(chain_of(0, tmp_path), ROOT)
    assert [stage.section.kind for stage in planned] == [
        "icl-build", "sft", "sft", "icl-evaluate", "icl-distill", "icl-evaluate",
    ]  # fmt: skip


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_context_is_learned_from_beyond_copying_and_distillation_moves_at_least_half_of_it(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = run_chain(chain_of(seed, tmp_path), ROOT)
    unseen, one = (points_of(tmp_path / f"icl-{seed}" / name) for name in ("unseen-tasks", "one-task"))
    with capsys.disabled():
        for report in reports:
            print(f"\nseed {seed}, {report.name} ({report.seconds:.0f} s): {report.headline}", end="")
    learned = [unseen["in-context", "none", k] for k in (0, 1, 2, 4, 8)]
    assert all(more["mean"] > fewer["mean"] for fewer, more in itertools.pairwise(learned))
    assert learned[-1]["low"] > learned[0]["high"] + 0.2
    assert learned[-1]["low"] > learned[-1]["copying"] + 0.2
    for name in ("base", "plain"):
        assert unseen[name, "none", 8]["mean"] < learned[-1]["copying"] + 0.05
    gain = one["in-context", "none", 8]["mean"] - one["in-context", "none", 0]["mean"]
    moved = one["distilled", "none", 0]["mean"] - one["in-context", "none", 0]["mean"]
    assert gain > 0.3
    assert moved > gain / 2
