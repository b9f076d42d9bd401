"""The `icl` commands: in-context learning from examples to models."""

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that replace those of the file: section.key=value ...")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the configuration, print the plan, start nothing.")]

app = typer.Typer(help="In-context learning: measure it, make data for it, distil it.", no_args_is_help=True)


@app.callback()
def icl() -> None:
    """In-context learning: measure it, make data for it, distil it."""


@app.command()
def build(
    config: Annotated[Path, typer.Argument(help="A YAML file with the configuration of an in-context dataset.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Put demonstrations before the examples of a dataset, as SFT data; the same command resumes what was interrupted."""
    from rayrlhf.config.icl import ICLBuildConfig
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.pipelines.icl.build_dataset import build_dataset, check_build

    loaded = load_config(ICLBuildConfig, config, overrides or [])
    for line in [check_build(loaded)] if dry_run else build_dataset(loaded).lines():
        typer.echo(line)


@app.command()
def pack(
    config: Annotated[Path, typer.Argument(help="A YAML file with the configuration of a packing.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Put related documents one after another into contexts, and by lot beside it; the same command resumes."""
    from rayrlhf.config.icl import ICLPackConfig
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.pipelines.icl.pack_documents import check_packing, pack_documents

    loaded = load_config(ICLPackConfig, config, overrides or [])
    for line in [check_packing(loaded)] if dry_run else pack_documents(loaded).lines():
        typer.echo(line)


@app.command()
def evaluate(
    config: Annotated[Path, typer.Argument(help="A YAML file with the configuration of a k-curve.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Score models against the number of demonstrations they are shown; the same command resumes what was interrupted."""
    from rayrlhf.config.icl import ICLEvaluateConfig
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.pipelines.icl.evaluate_icl import check_evaluation, evaluate_curve

    loaded = load_config(ICLEvaluateConfig, config, overrides or [])
    for line in [check_evaluation(loaded)] if dry_run else evaluate_curve(loaded).lines():
        typer.echo(line)


@app.command()
def distill(
    config: Annotated[Path, typer.Argument(help="A YAML file with the configuration of a context distillation.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Teach a model to answer as it does with demonstrations or an instruction; the same command resumes."""
    from rayrlhf.config.icl import ICLDistillConfig
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.pipelines.icl.distill import check_distillation, distill_context

    loaded = load_config(ICLDistillConfig, config, overrides or [])
    for line in [check_distillation(loaded)] if dry_run else distill_context(loaded).lines():
        typer.echo(line)
