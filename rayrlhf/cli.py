"""Command line: thin commands over functions that are also public in Python.

A user error ends with one line and exit code 2; a run that stopped itself or lost its machines, with one line and exit code 1;
a run that was stopped and can be resumed, with exit code 75. Anything else is a bug and keeps its traceback. Heavy imports are
inside the commands, so that help is instant.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from rayrlhf.errors import ActorLostError, AlarmError, DeadlineError, StoppedError, UserError
from rayrlhf.pipelines.icl.icl_commands import app as icl_app
from rayrlhf.pipelines.presft.presft_commands import app as presft_app
from rayrlhf.tools.bench.bench_commands import bench
from rayrlhf.tools.launch.launch_commands import plan, submit

app = typer.Typer(
    name="rayrlhf",
    help="RLHF as a distributed actor system on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and can be resumed by the same command (`EX_TEMPFAIL` of sysexits.h)."""

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that replace those of the file: section.key=value ...")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")]


@app.command()
def ppo(
    config: Annotated[Path, typer.Argument(help="A YAML file with a PPO configuration.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train a policy with PPO; the same command resumes a run that was interrupted."""
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.config.ppo import PPOConfig
    from rayrlhf.ppo.train_ppo import check_ppo, train_ppo

    loaded = load_config(PPOConfig, config, overrides or [])
    if dry_run:
        typer.echo(check_ppo(loaded))
    else:
        train_ppo(loaded)


@app.command()
def sft(
    config: Annotated[Path, typer.Argument(help="A YAML file with an SFT configuration.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune a model on given texts; the same command resumes a run that was interrupted."""
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.config.tuning.configs import SFTConfig
    from rayrlhf.tuning.train_model import check_sft, train_sft

    loaded = load_config(SFTConfig, config, overrides or [])
    if dry_run:
        typer.echo(check_sft(loaded))
    else:
        train_sft(loaded)


@app.command()
def reward(
    config: Annotated[Path, typer.Argument(help="A YAML file with a reward model's configuration.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train a reward model on preference pairs; the same command resumes a run that was interrupted."""
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.config.tuning.configs import RewardTrainingConfig
    from rayrlhf.tuning.train_model import check_reward, train_reward

    loaded = load_config(RewardTrainingConfig, config, overrides or [])
    if dry_run:
        typer.echo(check_reward(loaded))
    else:
        train_reward(loaded)


@app.command()
def dpo(
    config: Annotated[Path, typer.Argument(help="A YAML file with a DPO configuration.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train a policy on preference pairs without a reward model; the same command resumes a run that was interrupted."""
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.config.tuning.configs import DPOConfig
    from rayrlhf.tuning.train_model import check_dpo, train_dpo

    loaded = load_config(DPOConfig, config, overrides or [])
    if dry_run:
        typer.echo(check_dpo(loaded))
    else:
        train_dpo(loaded)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    merge: Annotated[bool, typer.Option("--merge", help="Fold adapters into their base model.")] = False,
    to: Annotated[
        Path | None, typer.Option(help="Where the model goes; `export-merged` in the run folder if not given.")
    ] = None,
) -> None:
    """Say where a run's model lies, or merge its adapters into a model that loads without them."""
    from rayrlhf.tuning.merge import exported_model

    typer.echo(exported_model(run, merge=merge, target=to))


@app.command()
def quickstart(overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """PPO of a real chat model on built-in word problems: two CPU cores, minutes, no network."""
    from rayrlhf.ppo.quickstart import run_quickstart

    run_quickstart(overrides or [], dry_run=dry_run)


@app.command(name="run")
def run_command(
    chain: Annotated[Path, typer.Argument(help="A YAML file with the stages of a chain.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Run a chain of stages (SFT, reward model, DPO, PPO, evaluation); finished stages are skipped on a rerun."""
    from rayrlhf.pipelines.chain.run_chain import load_chain, plan_chain, run_chain, summary

    config = load_chain(chain, overrides or [])
    if dry_run:
        for stage in plan_chain(config, chain.parent):
            typer.echo(f"{stage.section.name}: {stage.section.kind} -> {stage.folder}")
        return
    for line in summary(run_chain(config, chain.parent)):
        typer.echo(line)


@app.command()
def evaluate(
    config: Annotated[Path, typer.Argument(help="A YAML file with an evaluation's configuration.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Answer a dataset with one model and judge the answers, with intervals."""
    from rayrlhf.config.evaluate import EvaluateConfig
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.pipelines.evaluation.evaluate_model import check_evaluation, evaluate_model

    loaded = load_config(EvaluateConfig, config, overrides or [])
    for line in [check_evaluation(loaded)] if dry_run else evaluate_model(loaded).lines():
        typer.echo(line)


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(help="A run folder, or any Hugging Face model folder.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this one prompt and end.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
) -> None:
    """Talk to the model that a run made."""
    from rayrlhf.ppo.chat import chat_with

    chat_with(run, prompt, max_new_tokens=max_new_tokens, temperature=temperature)


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(help="The folder of a running PPO job.")],
    rollout: Annotated[int, typer.Option(min=1, help="Rollout replicas it shall have from its next step on.")],
) -> None:
    """Let rollout replicas join or leave a running job; those that find no room wait for a node that has some."""
    from rayrlhf.ppo.replica_scaling import want_replicas

    want_replicas(run, rollout)
    typer.echo(f"{run}: {rollout} rollout replicas are wanted from the next step on")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run: finished, going, or broken off.")],
    compare: Annotated[Path | None, typer.Option(help="Another run's folder, to draw beside this one.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="The file to write; `report.html` in the run folder if not given.")
    ] = None,
) -> None:
    """Write what a run did as one HTML file that opens offline."""
    from rayrlhf.tools.report.run_page import write_run_report
    from rayrlhf.tools.report.run_view import folder_kind

    if folder_kind(run) != "Pre-SFT":
        typer.echo(f"report: {write_run_report(run, compare=compare, output=output)}")
        return
    from rayrlhf.pipelines.presft.presft_report import write_presft_report

    if compare is not None:
        raise UserError("--compare draws curves over steps, which a Pre-SFT run has none of: leave it out")
    typer.echo(f"report: {write_presft_report(run, output)}")


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="The folder of a run, also one that another machine writes.")],
    serve: Annotated[bool, typer.Option("--serve", help="Show it as a page on this machine, for a browser.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 takes a free one.")] = 0,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks at the folder.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show the present state and end.")] = False,
) -> None:
    """Follow a run from its folder, on the terminal or as a local page; the run is not touched."""
    from rayrlhf.tools.watch.watch_server import serve_run
    from rayrlhf.tools.watch.watch_terminal import watch_terminal

    if serve:
        serve_run(run, port=port, announce=lambda address: typer.echo(f"{address}\n(only from this machine; Ctrl-C ends it)"))
    else:
        watch_terminal(run, every=every, once=once)


app.command()(plan)
app.command()(submit)
app.add_typer(presft_app, name="presft")
app.add_typer(icl_app, name="icl")
app.add_typer(bench, name="bench")


@app.command()
def init(
    task: Annotated[
        str, typer.Argument(help="ppo, sft, reward, dpo, presft, evaluate, icl-build, icl-pack, icl-evaluate or icl-distill.")
    ],
    path: Annotated[Path | None, typer.Argument(help="The file to write; TASK.yaml if not given.")] = None,
    model: Annotated[str | None, typer.Option(help="The model to begin with: a folder, a hub name or a built-in.")] = None,
    preset: Annotated[str | None, typer.Option(help="Algorithm of the task ppo: grpo, dapo, rloo, gspo, ...")] = None,
) -> None:
    """Write a small commented configuration that runs as it is."""
    from rayrlhf.tools.starters import MODEL, visible_gpus, write_starter

    target = path or Path(f"{task}.yaml")
    write_starter(task, target, model or MODEL, gpus=visible_gpus(), preset=preset)
    typer.echo(f"{target}: check it with `rayrlhf {task.replace('-', ' ')} {target} --dry-run`, then leave --dry-run out")


@app.command()
def schema(
    task: Annotated[
        str, typer.Argument(help="ppo, sft, reward, dpo, presft, evaluate, icl-build, icl-pack, icl-evaluate or icl-distill.")
    ],
) -> None:
    """Print the JSON schema of a configuration, for editors: every key with its meaning, default and bounds."""
    from rayrlhf.tools.starters import json_schema

    typer.echo(json.dumps(json_schema(task), indent=1))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="A list of findings for programs.")] = False,
) -> None:
    """Check whether this machine can run what is installed on it, and say how to mend what cannot."""
    from rayrlhf.tools.doctor.machine_checks import run_doctor

    if not run_doctor(as_json=as_json, echo=typer.echo):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    # Progress bars of model files would tear the live view apart.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        app()
    except UserError as error:
        print(f"rayrlhf: {error}", file=sys.stderr)  # noqa: T201 - the command's own output
        sys.exit(2)
    except (AlarmError, DeadlineError, ActorLostError) as error:
        print(f"rayrlhf: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    except StoppedError as error:
        print(f"rayrlhf: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    main()
