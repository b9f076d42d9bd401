"""`rayrlhf bench ...`: thin commands over the benchmarks, with lazy imports."""

from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(help="Compare speeds on this machine.", no_args_is_help=True)


@bench.command(name="presft")
def bench_presft_command(
    what: Annotated[str, typer.Argument(help="scoring, generation or memory.")],
    rows: Annotated[int, typer.Option(min=0, help="Rows of a run; 200,000, 2,048 or 1,000,000 when not given.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each contender.")] = 15,
    output: Annotated[Path | None, typer.Option(help="Folder for the results as JSON and Markdown.")] = None,
) -> None:
    """Compare Pre-SFT scoring with a plain loop, generation with plain vLLM; measure memory."""
    from rayrlhf.tools.bench.benchmarks import run_bench_presft

    run_bench_presft(what, rows, rounds=rounds, output=output, echo=typer.echo)


@bench.command(name="ppo")
def bench_ppo_command(
    precision: Annotated[list[str] | None, typer.Option(help="float32, bfloat16; both if not given.")] = None,
    model: Annotated[str, typer.Option(help="Policy; critic, reference and reward model are of its size.")] = "builtin:tiny",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a step, one response each.")] = 64,
    lora: Annotated[int, typer.Option(min=0, help="Rank of adapters on the policy; 0 trains it whole.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each contender.")] = 5,
    updates: Annotated[int, typer.Option(min=1, help="Timed PPO steps of a run.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder for the numbers as JSON and Markdown.")] = None,
) -> None:
    """Compare our PPO step with TRL's PPOTrainer and with plain torch and vLLM calls."""
    from rayrlhf.tools.bench.benchmarks import run_bench_ppo

    run_bench_ppo(
        precision or [],
        model=model,
        prompts=prompts,
        lora=lora,
        rounds=rounds,
        updates=updates,
        output=output,
        echo=typer.echo,
    )


@bench.command(name="rollout")
def bench_rollout_command(
    model: Annotated[str, typer.Option(help="The sampled model.")] = "builtin:smollm2-135m-instruct",
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each contender.")] = 15,
    transformers: Annotated[bool, typer.Option("--transformers", help="Measure transformers' generate too.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for the numbers as JSON and Markdown.")] = None,
) -> None:
    """Compare sampled tokens per second of our actors and plain vLLM."""
    from rayrlhf.tools.bench.benchmarks import run_bench_rollout

    run_bench_rollout(model, new_tokens=new_tokens, rounds=rounds, transformers=transformers, output=output, echo=typer.echo)


@bench.command(name="driver")
def bench_driver_command(
    samples: Annotated[list[int] | None, typer.Option(help="Samples of a step; 1,000 to 100,000 if not given.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Simulated rollout replicas.")] = 1000,
    output: Annotated[Path | None, typer.Option(help="Folder for the numbers as JSON.")] = None,
) -> None:
    """Measure the driver's cost per sample with simulated, instant replicas."""
    from rayrlhf.tools.bench.benchmarks import run_bench_driver

    run_bench_driver(samples or [1_000, 10_000, 100_000], replicas=replicas, output=output, echo=typer.echo)


@bench.command(name="sync")
def bench_sync_command(
    model: Annotated[str, typer.Option(help="The model whose weights are sent.")] = "builtin:smollm2-135m-instruct",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 15,
    output: Annotated[Path | None, typer.Option(help="Folder for the numbers as JSON and Markdown.")] = None,
) -> None:
    """Compare a weight sync and its transport with a copy in memory."""
    from rayrlhf.tools.bench.benchmarks import run_bench_sync

    run_bench_sync(model, rounds=rounds, output=output, echo=typer.echo)


@bench.command(name="sft")
def bench_sft_command(
    precision: Annotated[list[str] | None, typer.Option(help="float32, bfloat16; both if not given.")] = None,
    packing: Annotated[bool | None, typer.Option("--packing/--no-packing", help="Both if not given.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each trainer.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Timed optimizer steps of a run.")] = 6,
    output: Annotated[Path | None, typer.Option(help="Folder for the numbers as JSON and Markdown.")] = None,
) -> None:
    """Compare training tokens per second of our SFT and TRL's."""
    from rayrlhf.tools.bench.benchmarks import run_bench_sft

    run_bench_sft(precision or [], packing, rounds=rounds, steps=steps, output=output, echo=typer.echo)


@bench.command(name="train")
def bench_train_command(
    model: Annotated[str, typer.Option(help="The trained model.")] = "builtin:smollm2-135m-instruct",
    samples: Annotated[int, typer.Option(min=1, help="Samples of one optimizer step, word problems with solutions.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Optimizer steps of each contender.")] = 15,
    output: Annotated[Path | None, typer.Option(help="Folder for the numbers as JSON and Markdown.")] = None,
) -> None:
    """Compare an optimizer step of the policy actor with a plain torch step."""
    from rayrlhf.tools.bench.benchmarks import run_bench_training

    run_bench_training(model, samples=samples, rounds=rounds, output=output, echo=typer.echo)


@bench.command(name="overhead")
def bench_overhead_command(
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    model: Annotated[str, typer.Option(help="Policy; critic, reference and reward model are of its size.")] = "builtin:tiny",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a step, one response each.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of some steps each.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Folder for the numbers as JSON.")] = None,
) -> None:
    """Measure the share of a PPO step in which no actor computes."""
    from rayrlhf.tools.bench.benchmarks import run_bench_overhead

    run_bench_overhead(precision, model=model, prompts=prompts, rounds=rounds, output=output, echo=typer.echo)
