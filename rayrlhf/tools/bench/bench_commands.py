"""`rayrlhf bench ...`: run benchmarks, print the results, and write them.

Benchmarks are imported inside the commands, because they import torch, Ray or vLLM.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from rayrlhf.errors import UserError

if TYPE_CHECKING:
    from rayrlhf.tools.bench.paired import Comparison, Precision

PRESFT_ROWS = {"scoring": 200_000, "generation": 2_048, "memory": 1_000_000}
PRESFT_TOKENS = 32
PRESFT_MODEL = "builtin:tiny?context=1024"

bench = typer.Typer(help="Compare speeds on this machine.", no_args_is_help=True)

Output = Annotated[Path | None, typer.Option(help="Folder for the numbers as JSON and Markdown.")]
JsonOutput = Annotated[Path | None, typer.Option(help="Folder for the numbers as JSON.")]
Rounds = Annotated[int, typer.Option(min=1, help="Runs of each contender.")]
Precisions = Annotated[list[str] | None, typer.Option(help="float32, bfloat16; both if not given.")]
PolicyModel = Annotated[str, typer.Option(help="Policy; critic, reference and reward model are of its size.")]
Prompts = Annotated[int, typer.Option(min=1, help="Prompts of a step, one response each.")]


@bench.command(name="presft")
def bench_presft_command(
    what: Annotated[str, typer.Argument(help="scoring, generation or memory.")],
    rows: Annotated[int, typer.Option(min=0, help="Rows of a run; 200,000, 2,048 or 1,000,000 when not given.")] = 0,
    rounds: Rounds = 15,
    output: Annotated[Path | None, typer.Option(help="Folder for the results as JSON and Markdown.")] = None,
) -> None:
    """Compare Pre-SFT scoring with a plain loop, generation with plain vLLM; measure memory."""
    if what not in PRESFT_ROWS:
        raise UserError(f"bench presft {what}: expected {', '.join(PRESFT_ROWS)}")
    from rayrlhf.actors.connection import connected
    from rayrlhf.tools.bench.presft_speed import bench_generation, bench_scoring, million_rows

    rows = rows or PRESFT_ROWS[what]
    with connected(None):
        if what == "memory":
            gib, speed = million_rows(rows, typer.echo)
            typer.echo(f"{rows:,} rows: at most {gib:.2f} GiB in all processes together, {speed:,.0f} rows/s")
            _write(output, "presft-memory.json", {"rows": rows, "peak_gib": gib, "rows_per_second": speed})
            return
        if what == "scoring":
            found = bench_scoring(rows=rows, rounds=rounds, progress=typer.echo)
        else:
            found = bench_generation(PRESFT_MODEL, prompts=rows, new_tokens=PRESFT_TOKENS, rounds=rounds, progress=typer.echo)
    _show([found], output, f"presft-{what}")


@bench.command(name="ppo")
def bench_ppo_command(
    precision: Precisions = None,
    model: PolicyModel = "builtin:tiny",
    prompts: Prompts = 64,
    lora: Annotated[int, typer.Option(min=0, help="Rank of adapters on the policy; 0 is full fine-tuning.")] = 0,
    rounds: Rounds = 5,
    updates: Annotated[int, typer.Option(min=1, help="Timed PPO steps of a run.")] = 3,
    output: Output = None,
) -> None:
    """Compare our PPO step with TRL's PPOTrainer and with plain torch and vLLM calls."""
    from rayrlhf.storage.atomic import write_atomically
    from rayrlhf.tools.bench.ppo_step import bench_ppo, write_reward_model
    from rayrlhf.tools.bench.work import PPOWork

    found = []
    with TemporaryDirectory() as folder:
        policy, reward = write_reward_model(model, Path(folder) / "reward")
        for chosen in _chosen(precision or []):
            work = PPOWork(policy, reward, chosen, prompts, updates=updates, lora=lora)
            found.append(bench_ppo(work, critics=("separate", "shared"), rounds=rounds, progress=typer.echo))
            typer.echo(found[-1].as_markdown())
    if output is not None:
        write_comparisons([one.comparison for one in found], output, "ppo")
        phases = [{"seconds": one.seconds, "operations": one.operations, "peak": one.peak} for one in found]
        _write(output, "ppo-phases.json", phases)
        write_atomically(output / "ppo.md", "\n\n".join(one.as_markdown() for one in found) + "\n")


@bench.command(name="score")
def bench_score_command(
    precision: Precisions = None,
    target: Annotated[float, typer.Option(help="Held-out score that ends a run.")] = 0.4,
    steps: Annotated[int, typer.Option(min=1, help="Maximum steps of a run.")] = 16,
    every: Annotated[int, typer.Option(min=1, help="Steps between evaluations, which are not timed.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each trainer, each with its seed.")] = 3,
    output: Output = None,
) -> None:
    """Compare the time to a held-out score of GRPO with TRL's on the quickstart's task."""
    from rayrlhf.tools.bench.time_to_score import ScoreWork, bench_score

    found = []
    for chosen in _chosen(precision or []):
        found += bench_score(ScoreWork(chosen, target, steps, every), rounds=rounds, progress=typer.echo)
    _show(found, output, "score")


@bench.command(name="record")
def bench_record_command(
    model: PolicyModel = "builtin:tiny",
    prompts: Prompts = 64,
    updates: Annotated[int, typer.Option(min=1, help="Timed PPO steps of each level.")] = 20,
    output: JsonOutput = None,
) -> None:
    """Measure time and bytes that `observe.record` costs a PPO step."""
    from rayrlhf.tools.bench.ppo_step import write_reward_model
    from rayrlhf.tools.bench.record_cost import bench_record
    from rayrlhf.tools.bench.work import PPOWork

    with TemporaryDirectory() as folder:
        policy, reward = write_reward_model(model, Path(folder) / "reward")
        work = PPOWork(policy, reward, "float32", prompts, updates=updates)
        found = bench_record(work, progress=typer.echo)
    _write(output, "record.json", [asdict(cost) for cost in found])


@bench.command(name="rollout")
def bench_rollout_command(
    model: Annotated[str, typer.Option(help="The sampled model.")] = "builtin:smollm2-135m-instruct",
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 64,
    rounds: Rounds = 15,
    transformers: Annotated[bool, typer.Option("--transformers", help="Also measure transformers' generate.")] = False,
    output: Output = None,
) -> None:
    """Compare sampled tokens per second of our actors and plain vLLM."""
    from rayrlhf.tools.bench.rollout_speed import bench_rollout

    found = bench_rollout(model, new_tokens=new_tokens, rounds=rounds, transformers=transformers, progress=typer.echo)
    _show([found], output, "rollout")


@bench.command(name="driver")
def bench_driver_command(
    samples: Annotated[list[int] | None, typer.Option(help="Samples of a step; 1,000 to 100,000 if not given.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Simulated rollout replicas.")] = 1000,
    output: JsonOutput = None,
) -> None:
    """Measure the driver's cost per sample with simulated, instant replicas."""
    from rayrlhf.tools.bench.driver_cost import bench_driver

    found = bench_driver(samples or [1_000, 10_000, 100_000], replicas=replicas, progress=typer.echo)
    _write(output, "driver.json", [asdict(cost) for cost in found])


@bench.command(name="sync")
def bench_sync_command(
    model: Annotated[str, typer.Option(help="The model whose weights are sent.")] = "builtin:smollm2-135m-instruct",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 15,
    output: Output = None,
) -> None:
    """Compare a weight sync and its transport with a copy in memory."""
    from rayrlhf.tools.bench.sync_speed import bench_sync

    _show([bench_sync(model, rounds=rounds, progress=typer.echo)], output, "sync")


@bench.command(name="sft")
def bench_sft_command(
    precision: Precisions = None,
    packing: Annotated[bool | None, typer.Option("--packing/--no-packing", help="Both if not given.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each trainer.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Timed optimizer steps of a run.")] = 6,
    output: Output = None,
) -> None:
    """Compare training tokens per second of our SFT and TRL's."""
    from rayrlhf.tools.bench.sft_speed import bench_sft

    found = [
        bench_sft(precision=chosen, packing=packed, rounds=rounds, steps=steps, progress=typer.echo)
        for chosen in _chosen(precision or [])
        for packed in ([False, True] if packing is None else [packing])
    ]
    _show(found, output, "sft")


@bench.command(name="train")
def bench_train_command(
    model: Annotated[str, typer.Option(help="The trained model.")] = "builtin:smollm2-135m-instruct",
    samples: Annotated[int, typer.Option(min=1, help="Samples of one optimizer step, word problems with solutions.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Optimizer steps of each contender.")] = 15,
    output: Output = None,
) -> None:
    """Compare an optimizer step of the policy actor with a plain torch step."""
    from rayrlhf.tools.bench.update_speed import bench_training

    _show([bench_training(model, samples=samples, rounds=rounds, progress=typer.echo)], output, "train")


@bench.command(name="prefix")
def bench_prefix_command(
    model: Annotated[str, typer.Option(help="The trained model.")] = "builtin:smollm2-135m-instruct",
    case: Annotated[
        list[str] | None, typer.Option(help="group, long-prompt, demonstrations, pairs, agent, none, step.")
    ] = None,
    precision: Precisions = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each contender.")] = 3,
    micro_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a micro-batch of the update.")] = 4096,
    output: Output = None,
) -> None:
    """Compare updates, scoring and whole steps with shared prefixes and without."""
    from rayrlhf.tools.bench.prefix_speed import CASES, bench_prefix, bench_step

    for name in case or []:
        if name not in (*CASES, "step"):
            raise UserError(f"--case {name}: expected {', '.join(CASES)}, step")
    found = []
    for chosen in _chosen(precision or []):
        names = [name for name in case or CASES if name != "step"]
        if names:
            options = {"rounds": rounds, "micro_batch_tokens": micro_batch_tokens}
            found += bench_prefix(model, names, precision=chosen, progress=typer.echo, **options)
        if not case or "step" in case:
            found.append(bench_step(model, precision=chosen, rounds=rounds, progress=typer.echo))
    _show(found, output, "prefix")


@bench.command(name="overhead")
def bench_overhead_command(
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    model: PolicyModel = "builtin:tiny",
    prompts: Prompts = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of some steps each.")] = 3,
    output: JsonOutput = None,
) -> None:
    """Measure the share of a PPO step in which no actor computes."""
    from rayrlhf.tools.bench.overhead import bench_overhead
    from rayrlhf.tools.bench.ppo_step import write_reward_model
    from rayrlhf.tools.bench.work import PPOWork

    with TemporaryDirectory() as folder:
        policy, reward = write_reward_model(model, Path(folder) / "reward")
        work = PPOWork(policy, reward, _chosen([precision])[0], prompts)
        shares = bench_overhead(work, critic="separate", rounds=rounds, progress=typer.echo)
    typer.echo(f"{model}: no actor computes in {median(shares):.1%} of a step (median of {len(shares)})")
    _write(output, "overhead.json", {"work": asdict(work), "shares": shares, "median": median(shares)})


def _show(found: "Sequence[Comparison]", output: Path | None, name: str) -> None:
    for comparison in found:
        typer.echo(comparison.as_markdown())
    if output is not None:
        write_comparisons(found, output, name)


def _chosen(precisions: Sequence[str]) -> "list[Precision]":
    from rayrlhf.tools.bench.paired import Precision

    known = get_args(Precision)
    for name in precisions:
        if name not in known:
            raise UserError(f"--precision {name}: expected {' or '.join(known)}")
    return [name for name in known if name in precisions or not precisions]


def _write(folder: Path | None, name: str, content: object) -> None:
    from rayrlhf.storage.atomic import write_atomically

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, json.dumps(content, indent=1) + "\n")


def write_comparisons(found: "Sequence[Comparison]", folder: Path, name: str) -> None:
    """Write `name.json` (a list) and `name.md` atomically."""
    from rayrlhf.storage.atomic import write_atomically

    _write(folder, f"{name}.json", [comparison.numbers() for comparison in found])
    write_atomically(folder / f"{name}.md", "\n\n".join(comparison.as_markdown() for comparison in found) + "\n")
