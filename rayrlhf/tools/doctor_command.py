"""`rayrlhf doctor`: checks of this machine, of its GPU, or of vLLM against the trainer."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import typer

from rayrlhf.errors import UserError


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Test the GPU path in ten steps instead; takes minutes.")] = False,
    parity: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare vLLM and the trainer on this model, layer by layer.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Compute dtype of --parity: auto (if not given), float32, bfloat16.")
    ] = None,
) -> None:
    """Check this machine and installation, with a fix for each problem.

    With --parity, check instead that vLLM and the trainer compute the same, and name the first layer that differs.
    """
    if parity is None and dtype is not None:
        raise UserError(f"--dtype {dtype}: has no effect without --parity MODEL")
    if parity is not None and gpu:
        raise UserError("--gpu and --parity are two checks: expected one of them")
    check: Callable[..., bool]
    if parity is not None:
        from rayrlhf.tools.doctor.parity import run_parity

        check = partial(run_parity, parity, dtype or "auto")
    elif gpu:
        from rayrlhf.tools.gpu_check.check_runner import run_gpu_check as check
    else:
        from rayrlhf.tools.doctor.machine_checks import run_doctor as check

    if not check(as_json=as_json, echo=typer.echo):
        raise typer.Exit(1)
