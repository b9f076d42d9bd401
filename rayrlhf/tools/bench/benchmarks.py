"""Entry points of the benchmarks, with results as JSON and Markdown."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, get_args

from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import write_atomically
from rayrlhf.tools.bench.paired import Comparison, Precision

if TYPE_CHECKING:
    from rayrlhf.tools.bench.driver_cost import DriverCost
    from rayrlhf.tools.bench.ppo_step import PPOBench

PRESFT_ROWS = {"scoring": 200_000, "generation": 2_048, "memory": 1_000_000}
PRESFT_TOKENS = 32
PRESFT_MODEL = "builtin:tiny?context=1024"


def run_bench_sft(
    precisions: Sequence[str],
    packing: bool | None,
    *,
    rounds: int,
    steps: int,
    output: Path | None,
    echo: Callable[[str], None],
) -> list[Comparison]:
    """Compare our SFT with TRL's in the given settings.

    Args:
        precisions: `float32`, `bfloat16`; both when empty.
        packing: on, off, or both when None.
        steps: timed optimizer steps of a run.
        output: folder for `sft.json` and `sft.md`.

    Raises:
        UserError: an unknown precision, or TRL is not installed.
    """
    from rayrlhf.tools.bench.sft_speed import bench_sft

    found = [
        bench_sft(precision=precision, packing=packed, rounds=rounds, steps=steps, progress=echo)
        for precision in _chosen(precisions)
        for packed in ([False, True] if packing is None else [packing])
    ]
    for comparison in found:
        echo(comparison.as_markdown())
    if output is not None:
        write_comparisons(found, output, "sft")
    return found


def run_bench_ppo(
    precisions: Sequence[str],
    *,
    model: str,
    prompts: int = 64,
    lora: int = 0,
    rounds: int,
    updates: int,
    output: Path | None,
    echo: Callable[[str], None],
) -> "list[PPOBench]":
    """Compare our PPO step (separate and shared critic) with TRL's and with plain model calls.

    Args:
        precisions: `float32`, `bfloat16`; both when empty.
        model: of the policy; its critic, reference and reward model are of the same size.
        prompts: of a step.
        lora: rank of adapters on the policy; 0 trains it whole.
        updates: timed PPO steps of a run.
        output: folder for `ppo.json` and `ppo.md`.

    Raises:
        UserError: an unknown precision, or TRL's release cannot be installed.
    """
    from rayrlhf.tools.bench.ppo_step import bench_ppo, write_reward_model
    from rayrlhf.tools.bench.work import PPOWork

    found = []
    with TemporaryDirectory() as folder:
        policy, reward = write_reward_model(model, Path(folder) / "reward")
        for precision in _chosen(precisions):
            work = PPOWork(policy, reward, precision, prompts, updates=updates, lora=lora)
            found.append(bench_ppo(work, critics=("separate", "shared"), rounds=rounds, progress=echo))
            echo(found[-1].as_markdown())
    if output is not None:
        write_comparisons([one.comparison for one in found], output, "ppo")
        phases = [{"seconds": one.seconds, "operations": one.operations, "peak": one.peak} for one in found]
        write_atomically(output / "ppo-phases.json", json.dumps(phases, indent=1) + "\n")
        write_atomically(output / "ppo.md", "\n\n".join(one.as_markdown() for one in found) + "\n")
    return found


def run_bench_rollout(
    model: str, *, new_tokens: int, rounds: int, transformers: bool, output: Path | None, echo: Callable[[str], None]
) -> Comparison:
    """Compare sampling by our actors with plain vLLM and optionally transformers; writes `rollout.*`."""
    from rayrlhf.tools.bench.rollout_speed import bench_rollout

    found = bench_rollout(model, new_tokens=new_tokens, rounds=rounds, transformers=transformers, progress=echo)
    return _shown(found, output, "rollout", echo)


def run_bench_sync(model: str, *, rounds: int, output: Path | None, echo: Callable[[str], None]) -> Comparison:
    """Compare a weight sync and its transport with a copy in memory; writes `sync.*`."""
    from rayrlhf.tools.bench.sync_speed import bench_sync

    return _shown(bench_sync(model, rounds=rounds, progress=echo), output, "sync", echo)


def run_bench_driver(
    samples: Sequence[int], *, replicas: int, output: Path | None, echo: Callable[[str], None]
) -> "list[DriverCost]":
    """Measure the driver's cost of steps of these sizes; writes `driver.json`."""
    from rayrlhf.tools.bench.driver_cost import bench_driver, costs_as_json

    found = bench_driver(samples, replicas=replicas, progress=echo)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "driver.json", costs_as_json(found) + "\n")
    return found


def run_bench_training(
    model: str, *, samples: int, rounds: int, output: Path | None, echo: Callable[[str], None]
) -> Comparison:
    """Compare an optimizer step of the policy actor with a plain torch step; writes `train.*`."""
    from rayrlhf.tools.bench.update_speed import bench_training

    return _shown(bench_training(model, samples=samples, rounds=rounds, progress=echo), output, "train", echo)


def run_bench_overhead(
    precision: str, *, model: str, prompts: int, rounds: int, output: Path | None, echo: Callable[[str], None]
) -> list[float]:
    """Measure the share of a PPO step in which no actor computes; writes `overhead.json`."""
    from rayrlhf.tools.bench.overhead import bench_overhead, shares_as_json
    from rayrlhf.tools.bench.ppo_step import write_reward_model
    from rayrlhf.tools.bench.work import PPOWork

    with TemporaryDirectory() as folder:
        policy, reward = write_reward_model(model, Path(folder) / "reward")
        work = PPOWork(policy, reward, _chosen([precision])[0], prompts)
        shares = bench_overhead(work, critic="separate", rounds=rounds, progress=echo)
    echo(f"{model}: no actor computes in {sorted(shares)[len(shares) // 2]:.1%} of a step (median of {len(shares)})")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "overhead.json", shares_as_json(work, shares) + "\n")
    return shares


def run_bench_presft(what: str, rows: int, *, rounds: int, output: Path | None, echo: Callable[[str], None]) -> None:
    """Run a Pre-SFT benchmark and show its result.

    Args:
        what: `scoring`, `generation` or `memory`.
        rows: of a run; 0 for the default size.
        rounds: runs of each contender; `memory` runs once.

    Raises:
        UserError: an unknown benchmark.
    """
    if what not in PRESFT_ROWS:
        raise UserError(f"bench presft {what}: expected {', '.join(PRESFT_ROWS)}")
    from rayrlhf.actors.connection import connected
    from rayrlhf.tools.bench.presft_speed import bench_generation, bench_scoring, million_rows

    rows = rows or PRESFT_ROWS[what]
    with connected(None):
        if what == "memory":
            gib, speed = million_rows(rows, echo)
            echo(f"{rows:,} rows: at most {gib:.2f} GiB in all processes together, {speed:,.0f} rows/s")
            if output is not None:
                output.mkdir(parents=True, exist_ok=True)
                found = {"rows": rows, "peak_gib": gib, "rows_per_second": speed}
                write_atomically(output / "presft-memory.json", json.dumps(found, indent=1))
            return
        if what == "scoring":
            comparison = bench_scoring(rows=rows, rounds=rounds, progress=echo)
        else:
            comparison = bench_generation(PRESFT_MODEL, prompts=rows, new_tokens=PRESFT_TOKENS, rounds=rounds, progress=echo)
    echo(comparison.as_markdown())
    if output is not None:
        write_comparisons([comparison], output, f"presft-{what}")


def _shown(found: Comparison, output: Path | None, name: str, echo: Callable[[str], None]) -> Comparison:
    echo(found.as_markdown())
    if output is not None:
        write_comparisons([found], output, name)
    return found


def _chosen(precisions: Sequence[str]) -> list[Precision]:
    known: tuple[Precision, ...] = get_args(Precision)
    for name in precisions:
        if name not in known:
            raise UserError(f"--precision {name}: expected {' or '.join(known)}")
    return [name for name in known if name in precisions or not precisions]


def write_comparisons(found: Sequence[Comparison], folder: Path, name: str) -> None:
    """Write `name.json` (a list) and `name.md` atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", "[" + ",\n".join(comparison.as_json() for comparison in found) + "]\n")
    write_atomically(folder / f"{name}.md", "\n\n".join(comparison.as_markdown() for comparison in found) + "\n")
