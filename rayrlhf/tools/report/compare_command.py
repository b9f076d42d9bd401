"""`rayrlhf compare`: the first difference of two runs, and their common page."""

from pathlib import Path
from typing import Annotated

import typer


def compare(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    other: Annotated[Path, typer.Argument(help="The folder of another run.")],
    output: Annotated[
        Path | None, typer.Option(help="The page to write; `report-against-NAME.html` in the first folder if not given.")
    ] = None,
) -> None:
    """Find where two runs differ first, with likely causes; exit code 1 if they do."""
    from rayrlhf.tools.report.first_difference import difference_lines
    from rayrlhf.tools.report.run_page import write_run_report
    from rayrlhf.tools.report.run_view import read_run

    lines = difference_lines(*(read_run(folder, max_rollouts=0) for folder in (run, other)))
    typer.echo("\n".join(lines))
    typer.echo(f"page: {write_run_report(run, compare=other, output=output)}")
    if not lines[0].startswith("no "):
        raise typer.Exit(1)
