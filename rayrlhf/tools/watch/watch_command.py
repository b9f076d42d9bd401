"""`rayrlhf watch`."""

from pathlib import Path
from typing import Annotated

import typer


def watch(
    run: Annotated[Path, typer.Argument(help="The folder of a run, also of another machine.")],
    serve: Annotated[bool, typer.Option("--serve", help="Serve a page for a browser on this machine.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 for a free one.")] = 0,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between updates.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show the current state and exit.")] = False,
) -> None:
    """Follow a run on the terminal or as a local page, reading its folder only."""
    from rayrlhf.tools.watch.watch_server import serve_run
    from rayrlhf.tools.watch.watch_terminal import watch_terminal

    if serve:
        serve_run(run, port=port, announce=lambda address: typer.echo(f"{address}\n(this machine only; Ctrl-C ends it)"))
    else:
        watch_terminal(run, every=every, once=once)
