"""Running benchmarks and keeping what they found, as JSON for programs and Markdown for people."""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, get_args

from rayrlhf.bench.paired import Comparison, Precision
from rayrlhf.data.atomic import write_atomically
from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from rayrlhf.bench.driver import DriverCost


def run_bench_sft(
    precisions: Sequence[str],
    packing: bool | None,
    *,
    rounds: int,
    steps: int,
    output: Path | None,
    echo: Callable[[str], None],
) -> list[Comparison]:
    """Compare our SFT with TRL's in the settings asked for.

    Args:
        precisions: `float32`, `bfloat16`; both when empty.
        packing: on, off, or both when None.
        rounds: runs of each trainer.
        steps: timed optimizer steps of a run.
        output: folder for `sft.json` and `sft.md`.
        echo: told what is measured.

    Raises:
        UserError: an unknown precision, or TRL is not installed.
    """
    from rayrlhf.bench.sft import bench_sft

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
    rounds: int,
    updates: int,
    output: Path | None,
    echo: Callable[[str], None],
) -> list[Comparison]:
    """Compare our PPO step, with a critic of its own and with a shared trunk, with TRL's and with its bare model calls.

    Args:
        precisions: `float32`, `bfloat16`; both when empty.
        model: of the policy; its critic, reference and reward model are of the same size.
        rounds: runs of each contender.
        updates: timed PPO steps of a run.
        output: folder for `ppo.json` and `ppo.md`.
        echo: told what is measured.

    Raises:
        UserError: an unknown precision, or TRL's release cannot be installed.
    """
    from rayrlhf.bench.ppo import PPOWork, bench_ppo, write_reward_model

    found = []
    with TemporaryDirectory() as folder:
        policy, reward = write_reward_model(model, Path(folder) / "reward")
        for precision in _chosen(precisions):
            work = PPOWork(policy, reward, precision, updates=updates)
            found.append(bench_ppo(work, critics=("separate", "shared"), rounds=rounds, progress=echo))
            echo(found[-1].as_markdown())
    if output is not None:
        write_comparisons(found, output, "ppo")
    return found


def run_bench_rollout(
    model: str, *, new_tokens: int, rounds: int, transformers: bool, output: Path | None, echo: Callable[[str], None]
) -> Comparison:
    """Compare sampling through our actors with bare vLLM, and with transformers if asked for; `output` gets `rollout.*`."""
    from rayrlhf.bench.rollout import bench_rollout

    found = bench_rollout(model, new_tokens=new_tokens, rounds=rounds, transformers=transformers, progress=echo)
    return _shown(found, output, "rollout", echo)


def run_bench_sync(model: str, *, rounds: int, output: Path | None, echo: Callable[[str], None]) -> Comparison:
    """Compare a weight sync and its transport with a copy in memory; `output` gets `sync.*`."""
    from rayrlhf.bench.sync import bench_sync

    return _shown(bench_sync(model, rounds=rounds, progress=echo), output, "sync", echo)


def run_bench_driver(
    samples: Sequence[int], *, replicas: int, output: Path | None, echo: Callable[[str], None]
) -> "list[DriverCost]":
    """Measure what steps of so many samples cost the driver; `output` gets `driver.json`."""
    from rayrlhf.bench.driver import bench_driver, costs_as_json

    found = bench_driver(samples, replicas=replicas, progress=echo)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "driver.json", costs_as_json(found) + "\n")
    return found


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
    """Write `name.json` (a list) and `name.md`, each whole."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", "[" + ",\n".join(comparison.as_json() for comparison in found) + "]\n")
    write_atomically(folder / f"{name}.md", "\n\n".join(comparison.as_markdown() for comparison in found) + "\n")
