"""The `presft` commands: the whole run, or its steps one by one with a look in between."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rayrlhf.config.presft import PreSFTConfig
    from rayrlhf.pipelines.presft.run_presft import PreSFTResult

ConfigFile = Annotated[Path, typer.Argument(help="A YAML file with a Pre-SFT configuration.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that replace those of the file: section.key=value ...")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the configuration, print the plan, start nothing.")]


class _WholeRunByDefault(TyperGroup):
    """`presft CONFIG` means `presft run CONFIG`."""

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
    """Tune, score, select, relabel, and tune again from the base; the same command resumes what was interrupted."""
    loaded = _load(config, overrides)
    if dry_run:
        from rayrlhf.pipelines.presft.dry_run import check_presft, describe

        check_presft(loaded)
        typer.echo(describe(loaded))
        return
    from rayrlhf.pipelines.presft.run_presft import run_presft

    _tell(run_presft(loaded))


@app.command()
def score(config: ConfigFile, overrides: Overrides = None) -> None:
    """Answer every prompt with the tuned model and score the answers against the dataset's; tunes first if need be."""
    from rayrlhf.pipelines.presft.run_presft import run_presft

    _tell(run_presft(_load(config, overrides), "score"))


@app.command()
def select(config: ConfigFile, overrides: Overrides = None) -> None:
    """Find the cut below which pairs struggle; may be repeated with other settings until `relabel` has begun."""
    from rayrlhf.pipelines.presft.run_presft import run_presft

    _tell(run_presft(_load(config, overrides), "select"))


@app.command()
def relabel(config: ConfigFile, overrides: Overrides = None) -> None:
    """Give the struggling pairs new responses, as configured, and write the repaired dataset."""
    from rayrlhf.pipelines.presft.run_presft import run_presft

    _tell(run_presft(_load(config, overrides), "relabel"))


@app.command()
def report(config: ConfigFile, overrides: Overrides = None) -> None:
    """Write `report.html` and `datasheet.json` of what is there."""
    from rayrlhf.pipelines.presft.run_presft import report_presft

    _tell(report_presft(_load(config, overrides)))


def _load(config: Path, overrides: list[str] | None) -> "PreSFTConfig":
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.config.presft import PreSFTConfig

    return load_config(PreSFTConfig, config, overrides or [])


def _tell(result: "PreSFTResult") -> None:
    typer.echo(f"report: {result.folder / 'report.html'}")
    if result.dataset is not None:
        typer.echo(f"dataset: {result.dataset}")
    if result.export is not None:
        typer.echo(f"model: {result.export}")
