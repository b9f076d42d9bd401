"""The `presft` commands: the whole run, or its steps one by one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rayrlhf.config.pipelines import PreSFTConfig
    from rayrlhf.pipelines.presft.run_presft import PreSFTResult

ConfigFile = Annotated[Path, typer.Argument(help="A YAML file with a Pre-SFT configuration.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that replace those of the file: section.key=value ...")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the configuration, print the plan, start nothing.")]


class _WholeRunByDefault(TyperGroup):
    """Command group in which `presft CONFIG` means `presft run CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_WholeRunByDefault,
    help="Pre-SFT: let the model decide which supervision to keep. `presft CONFIG` does all steps.",
    no_args_is_help=True,
)


@app.command()
def run(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Tune, score, select, relabel, and tune again from the base model; resumable."""
    loaded = _load(config, overrides)
    if dry_run:
        from rayrlhf.pipelines.presft.dry_run import check_presft, describe, describe_data

        check_presft(loaded)
        for line in (describe(loaded), *describe_data(loaded)):
            typer.echo(line)
        return
    from rayrlhf.pipelines.presft.run_presft import run_presft

    _print_result(run_presft(loaded))


@app.command()
def score(config: ConfigFile, overrides: Overrides = None) -> None:
    """Score the tuned model's responses against the dataset's; tune first if needed."""
    from rayrlhf.pipelines.presft.run_presft import run_presft

    _print_result(run_presft(_load(config, overrides), "score"))


@app.command()
def select(config: ConfigFile, overrides: Overrides = None) -> None:
    """Find the cut below which pairs struggle; repeatable until `relabel` starts."""
    from rayrlhf.pipelines.presft.run_presft import run_presft

    _print_result(run_presft(_load(config, overrides), "select"))


@app.command()
def relabel(config: ConfigFile, overrides: Overrides = None) -> None:
    """Relabel the struggling pairs, and write the repaired dataset."""
    from rayrlhf.pipelines.presft.run_presft import run_presft

    _print_result(run_presft(_load(config, overrides), "relabel"))


@app.command()
def report(config: ConfigFile, overrides: Overrides = None) -> None:
    """Write `report.html` and `datasheet.json` of the finished steps."""
    from rayrlhf.pipelines.presft.run_presft import report_presft

    _print_result(report_presft(_load(config, overrides)))


def _load(config: Path, overrides: list[str] | None) -> "PreSFTConfig":
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.config.pipelines import PreSFTConfig

    return load_config(PreSFTConfig, config, overrides or [])


def _print_result(result: "PreSFTResult") -> None:
    typer.echo(f"report: {result.folder / 'report.html'}")
    if result.dataset is not None:
        typer.echo(f"dataset: {result.dataset}")
    if result.export is not None:
        typer.echo(f"model: {result.export}")
