"""Command line: thin commands over functions that are also public in Python.

A user error ends with one line and exit code 2; a run that stopped itself or lost its machines, with one line and exit code 1;
a run that was stopped and can be resumed, with exit code 75. Anything else is a bug and keeps its traceback. Heavy imports are
inside the commands, so that help is instant.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import typer
import typer.core

from rayrlhf.errors import ActorLostError, AlarmError, DeadlineError, StoppedError, UserError
from rayrlhf.observe.library_warnings import LIBRARY_WARNINGS
from rayrlhf.observe.loop_control import job_lines, stop_as_error
from rayrlhf.pipelines.icl.icl_commands import app as icl_app
from rayrlhf.pipelines.presft.presft_commands import app as presft_app
from rayrlhf.storage.atomic import full_disk
from rayrlhf.tools.bench.bench_commands import bench
from rayrlhf.tools.debug.debug_command import debug
from rayrlhf.tools.debug.replay_command import replay
from rayrlhf.tools.doctor_command import doctor
from rayrlhf.tools.launch.launch_commands import plan, submit
from rayrlhf.tools.publish.push_command import push
from rayrlhf.tools.publish.serve_command import serve
from rayrlhf.tools.report.compare_command import compare
from rayrlhf.tools.watch.watch_command import watch

if TYPE_CHECKING:
    from rayrlhf.config.section import Section


class Result(Protocol):
    """Result of a training command."""

    @property
    def folder(self) -> Path:
        """Run folder."""

    @property
    def steps(self) -> int:
        """Steps of the run."""


ConfigType = TypeVar("ConfigType", bound="Section")


class _Commands(typer.core.TyperGroup):
    """Commands that end on a stop signal with one line and exit code 75."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with stop_as_error():
            return super().invoke(ctx)


app = typer.Typer(
    name="rayrlhf",
    cls=_Commands,
    help="RLHF as a distributed actor system on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

EXIT_STOPPED = 75
"""Exit code of a stopped run that the same command resumes (`EX_TEMPFAIL` of sysexits.h)."""

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that replace those of the file: section.key=value ...")]
From = Annotated[Path | None, typer.Option("--from", help="Start with the weights of a finished run, under another run.name.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, start nothing.")]


@app.callback()
def options(verbose: Annotated[bool, typer.Option("--verbose", help="Also show warnings of libraries.")] = False) -> None:
    """Apply the options of all commands."""
    LIBRARY_WARNINGS.shown = verbose


@app.command()
def ppo(
    config: Annotated[Path, typer.Argument(help="A YAML file with a PPO configuration.")],
    overrides: Overrides = None,
    begin_with: From = None,
    dry_run: DryRun = False,
) -> None:
    """Train a policy with PPO; rerun the command to resume."""
    from rayrlhf.config.ppo import PPOConfig
    from rayrlhf.ppo.train_ppo import check_ppo, train_ppo

    _check_or_train(PPOConfig, check_ppo, train_ppo, config, overrides, begin_with, dry_run, merges_adapters=True)


app.command(name="rl", help="Alias of `rayrlhf ppo`, for any algorithm of its configuration.")(ppo)


@app.command()
def sft(
    config: Annotated[Path, typer.Argument(help="A YAML file with an SFT configuration.")],
    overrides: Overrides = None,
    begin_with: From = None,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune a model on given texts; rerun the command to resume."""
    from rayrlhf.config.tuning import SFTConfig
    from rayrlhf.tuning.train_model import check_sft, train_sft

    _check_or_train(SFTConfig, check_sft, train_sft, config, overrides, begin_with, dry_run)


@app.command()
def reward(
    config: Annotated[Path, typer.Argument(help="A YAML file with a reward model's configuration.")],
    overrides: Overrides = None,
    begin_with: From = None,
    dry_run: DryRun = False,
) -> None:
    """Train a reward model on preference pairs or labeled steps; rerun the command to resume."""
    from rayrlhf.config.tuning import RewardTrainingConfig
    from rayrlhf.tuning.train_model import check_reward, train_reward

    _check_or_train(RewardTrainingConfig, check_reward, train_reward, config, overrides, begin_with, dry_run, chat=False)


@app.command()
def dpo(
    config: Annotated[Path, typer.Argument(help="A YAML file with a DPO configuration.")],
    overrides: Overrides = None,
    begin_with: From = None,
    dry_run: DryRun = False,
) -> None:
    """Train a policy on preference pairs with DPO; rerun the command to resume."""
    from rayrlhf.config.tuning import DPOConfig
    from rayrlhf.tuning.train_model import check_dpo, train_dpo

    _check_or_train(DPOConfig, check_dpo, train_dpo, config, overrides, begin_with, dry_run)


def _check_or_train(
    kind: type[ConfigType],
    check: Callable[[ConfigType], str],
    train: Callable[[ConfigType], Result],
    path: Path,
    overrides: list[str] | None,
    begin_with: Path | None,
    dry_run: bool,
    *,
    chat: bool = True,
    merges_adapters: bool = False,
) -> None:
    """Load a configuration, then print its plan or train."""
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.observe.closing import closing_lines

    weights = [] if begin_with is None else [f"model.path={json.dumps(str(begin_with.absolute()))}"]
    config = load_config(kind, path, [*weights, *(overrides or [])])
    if begin_with is not None and not (begin_with / "config.yaml").is_file():
        raise UserError(f"--from {begin_with}: not a run folder; expected one with config.yaml and export/")
    if dry_run:
        typer.echo(check(config))
        return
    began = time.monotonic()
    result = train(config)
    for line in closing_lines(result.folder, result.steps, time.monotonic() - began, chat=chat, merged=merges_adapters):
        typer.echo(line)


@app.command()
def data(
    config: Annotated[Path, typer.Argument(help="A YAML configuration of SFT, DPO, a reward model, PPO or evaluation.")],
    overrides: Overrides = None,
    task: Annotated[
        str | None, typer.Option(help="sft, dpo, reward, ppo or evaluate; the first that fits if not given.")
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Number of rows to show.")] = 3,
    html: Annotated[Path | None, typer.Option(help="Also write a page that opens offline.")] = None,
) -> None:
    """Show the text and loss mask that a model reads of the training data."""
    from rayrlhf.tools.data_view import show_data

    show_data(config, overrides or [], task, rows, html)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge adapters into their base model.")] = False,
    to: Annotated[Path | None, typer.Option(help="Target folder; `export-merged` in the run folder if not given.")] = None,
) -> None:
    """Show the path of a run's model, or merge its adapters."""
    from rayrlhf.tuning.merge import exported_model

    typer.echo(exported_model(run, merge=merge, target=to, report=partial(typer.echo, err=True)))


@app.command()
def quickstart(
    overrides: Overrides = None,
    algorithm: Annotated[str, typer.Option(help="ppo, or another recipe: grpo, rloo, reinforce++, remax, ...")] = "ppo",
    dry_run: DryRun = False,
) -> None:
    """Train a chat model with PPO on built-in word problems, on two CPU cores."""
    from rayrlhf.ppo.quickstart import run_quickstart

    run_quickstart(overrides or [], algorithm=algorithm, dry_run=dry_run)


@app.command(name="run")
def run_command(
    chain: Annotated[Path, typer.Argument(help="A YAML file with the stages of the chain.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Run a chain of stages (SFT, reward model, PPO, ...); reruns skip finished ones."""
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
    config: Annotated[Path, typer.Argument(help="A YAML file with an evaluation's configuration, or a run for --harness.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that replace those of the file: section.key=value ...; tasks for --harness."),
    ] = None,
    dry_run: DryRun = False,
    harness: Annotated[str | None, typer.Option(help="Evaluate on tasks of a harness: lm-eval.")] = None,
) -> None:
    """Generate responses to a dataset with one model and score them, with intervals."""
    if harness is not None:
        from rayrlhf.pipelines.evaluation.harness import evaluate_on_tasks

        for line in evaluate_on_tasks(harness, config, overrides or [], check_only=dry_run):
            typer.echo(line)
        return
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.config.pipelines import EvaluateConfig
    from rayrlhf.observe.closing import folder_line
    from rayrlhf.pipelines.evaluation.evaluate_model import check_evaluation, evaluate_model

    loaded = load_config(EvaluateConfig, config, overrides or [])
    for line in [check_evaluation(loaded)] if dry_run else [*evaluate_model(loaded).lines(), *folder_line(loaded.run.folder)]:
        typer.echo(line)


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(help="A run folder, or any Hugging Face model folder.")],
    prompt: Annotated[str | None, typer.Option(help="Respond to this one prompt and exit.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum response length in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
) -> None:
    """Chat with the model of a run."""
    from rayrlhf.ppo.chat import chat_with

    chat_with(run, prompt, max_new_tokens=max_new_tokens, temperature=temperature)


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(help="The folder of a running PPO job.")],
    rollout: Annotated[int, typer.Option(min=1, help="Number of rollout replicas from the next step on.")],
) -> None:
    """Set the number of rollout replicas of a running job.

    New replicas that do not fit wait for a node with free resources.
    """
    from rayrlhf.ppo.replica_scaling import want_replicas

    want_replicas(run, rollout)
    typer.echo(f"{run}: {rollout} rollout replicas from the next step on")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run: finished, running, or stopped.")],
    compare: Annotated[Path | None, typer.Option(help="Another run's folder, for comparison.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The file to write; if not given, `report.html` or `report-against-NAME.html` in the run folder."),
    ] = None,
) -> None:
    """Write a report of a run as one HTML file that opens offline."""
    from rayrlhf.tools.report.run_page import write_run_report
    from rayrlhf.tools.report.run_view import folder_kind

    if folder_kind(run) != "Pre-SFT":
        typer.echo(f"report: {write_run_report(run, compare=compare, output=output)}")
        return
    from rayrlhf.pipelines.presft.presft_report import write_presft_report

    if compare is not None:
        raise UserError("--compare draws curves over steps, which a Pre-SFT run does not have: leave it out")
    typer.echo(f"report: {write_presft_report(run, output)}")


for command in (watch, compare, debug, replay, plan, submit, push, serve, doctor):
    app.command()(command)
app.add_typer(presft_app, name="presft")
app.add_typer(icl_app, name="icl")
app.add_typer(bench, name="bench")


@app.command()
def init(
    task: Annotated[
        str | None,
        typer.Argument(help="ppo, sft, reward, dpo, presft, evaluate, icl-build, icl-pack, icl-evaluate or icl-distill."),
    ] = None,
    path: Annotated[Path | None, typer.Argument(help="The file to write; TASK.yaml if not given.")] = None,
    model: Annotated[str | None, typer.Option(help="The initial model: a folder, a hub name or a built-in.")] = None,
    preset: Annotated[str | None, typer.Option(help="Algorithm of the task ppo: grpo, dapo, rloo, gspo, ...")] = None,
    from_trl: Annotated[
        str | None,
        typer.Option(
            help="A configuration of TRL: a script or JSON file with one, `GRPOConfig(...)`, or its keyword arguments."
        ),
    ] = None,
) -> None:
    """Write a small commented configuration that runs unchanged."""
    from rayrlhf.tools.starters import MODEL, visible_gpus, write_starter, write_text

    if from_trl is not None:
        from rayrlhf.tools.starters.from_trl import starter_from_trl

        if preset is not None:
            raise UserError("--preset has no effect with --from-trl: remove one of them")
        task, text = starter_from_trl(from_trl, task, model)
        target = path or Path(f"{task}.yaml")
        write_text(target, text)
    elif task is None:
        raise UserError("expected a TASK or --from-trl; see `rayrlhf init --help`")
    else:
        target = path or Path(f"{task}.yaml")
        write_starter(task, target, model or MODEL, gpus=visible_gpus(), preset=preset)
    typer.echo(f"{target}: check it with `rayrlhf {task.replace('-', ' ')} {target} --dry-run`, then leave --dry-run out")


@app.command()
def schema(
    task: Annotated[
        str, typer.Argument(help="ppo, sft, reward, dpo, presft, evaluate, icl-build, icl-pack, icl-evaluate or icl-distill.")
    ],
) -> None:
    """Print the JSON schema of a configuration: keys, descriptions, defaults, bounds."""
    from rayrlhf.tools.starters import json_schema

    typer.echo(json.dumps(json_schema(task), indent=1))


def main() -> None:
    """Entry point of the console script."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "RAY_USAGE_STATS_ENABLED": "0"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    try:
        for line in job_lines():
            typer.echo(line, err=True)
        with LIBRARY_WARNINGS.kept():
            app()
    except OSError as error:
        if not (reason := full_disk(error)):
            raise
        print(f"rayrlhf: {reason}; free some space, then the same command resumes", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except (UserError, AlarmError, DeadlineError, ActorLostError, StoppedError) as error:
        print(f"rayrlhf: {error}", file=sys.stderr)  # noqa: T201 - the command's own output
        sys.exit(2 if isinstance(error, UserError) else EXIT_STOPPED if isinstance(error, StoppedError) else 1)


if __name__ == "__main__":
    main()
