"""The `icl` commands of the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rayrlhf.observe.closing import folder_line

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that replace those of the file: section.key=value ...")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the configuration, print the plan, start nothing.")]

app = typer.Typer(help="In-context learning: measure it, build data for it, distill it.", no_args_is_help=True)


@app.callback()
def icl() -> None:
    """In-context learning: measure it, build data for it, distill it."""


@app.command()
def build(
    config: Annotated[Path, typer.Argument(help="A YAML file with the configuration of an in-context dataset.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Build SFT data with demonstrations before each example; resumable."""
    from rayrlhf.config.icl import ICLBuildConfig
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.pipelines.icl.build_dataset import build_dataset, check_build
    from rayrlhf.pipelines.icl.example_pool import describe_pool

    loaded = load_config(ICLBuildConfig, config, overrides or [])
    _plan_or_run(loaded, dry_run, lambda: [check_build(loaded), describe_pool(loaded.data)], build_dataset)


@app.command()
def pack(
    config: Annotated[Path, typer.Argument(help="A YAML file with the configuration of a packing.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Pack related documents into contexts, with a random baseline; resumable."""
    from rayrlhf.config.icl import ICLPackConfig
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.pipelines.icl.example_pool import describe_pool
    from rayrlhf.pipelines.icl.pack_documents import check_packing, pack_documents

    loaded = load_config(ICLPackConfig, config, overrides or [])
    pool = loaded.data.examples()
    _plan_or_run(loaded, dry_run, lambda: [check_packing(loaded), describe_pool(pool, answered=False)], pack_documents)


@app.command()
def evaluate(
    config: Annotated[Path, typer.Argument(help="A YAML file with the configuration of a k-curve.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Score models by the number of demonstrations; resumable."""
    from rayrlhf.config.icl import ICLEvaluateConfig
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.pipelines.icl.evaluate_icl import check_evaluation, describe_data, evaluate_curve

    loaded = load_config(ICLEvaluateConfig, config, overrides or [])
    _plan_or_run(loaded, dry_run, lambda: [check_evaluation(loaded), *describe_data(loaded)], evaluate_curve)


@app.command()
def distill(
    config: Annotated[Path, typer.Argument(help="A YAML file with the configuration of a context distillation.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Distill demonstrations or an instruction into a model; resumable."""
    from rayrlhf.config.icl import ICLDistillConfig
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.pipelines.icl.distill import check_distillation, describe_data, distill_context

    loaded = load_config(ICLDistillConfig, config, overrides or [])
    _plan_or_run(loaded, dry_run, lambda: [check_distillation(loaded), *describe_data(loaded)], distill_context)


def _plan_or_run(loaded: Any, dry_run: bool, plan: Callable[[], list[str]], run: Callable[[Any], Any]) -> None:
    """Print the plan, or run and print the result."""
    for line in plan() if dry_run else [*run(loaded).lines(), *folder_line(loaded.run.folder)]:
        typer.echo(line)
