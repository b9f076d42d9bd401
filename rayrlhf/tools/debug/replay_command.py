"""`rayrlhf replay`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer


def replay(
    run: Annotated[Path, typer.Argument(help="The folder of a PPO run with `observe.record`.")],
    step: Annotated[int, typer.Option(min=1, help="The step to execute, as in metrics.jsonl.")],
    phase: Annotated[
        str, typer.Option(help="score, experience (without a model), update, all of them, or sync.", show_default=True)
    ] = "all",
    changed: Annotated[
        list[str] | None, typer.Option("--set", help="Execute it with another setting, section.key=value; may be repeated.")
    ] = None,
) -> None:
    """Execute a recorded step again without sampling, and compare every number.

    Ends with exit code 1 if one differs. With --set it prints the metrics of both.
    """
    from rayrlhf.ppo.replay import replay_step

    outcome = replay_step(run, step, phase, changed or [], partial(typer.echo, err=True))
    for line in outcome.lines():
        typer.echo(line)
    if outcome.first_difference:
        raise typer.Exit(1)
