"""Running benchmarks and keeping what they found, as JSON for programs and Markdown for people."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from rayrlhf.bench.paired import Comparison
from rayrlhf.data.atomic import write_atomically
from rayrlhf.errors import UserError


def run_bench_sft(
    precisions: Sequence[str],
    packing: bool | None,
    *,
    rounds: int,
    steps: int,
    output: Path | None,
    echo: Callable[[str], None],
) -> list[Comparison]:
    """Compare our SFT with TRL's in the settings asked for.

    Args:
        precisions: `float32`, `bfloat16`; both when empty.
        packing: on, off, or both when None.
        rounds: runs of each trainer.
        steps: timed optimizer steps of a run.
        output: folder for `sft.json` and `sft.md`.
        echo: told what is measured.

    Raises:
        UserError: an unknown precision, or TRL is not installed.
    """
    from rayrlhf.bench.sft import Precision, bench_sft

    known: tuple[Precision, ...] = get_args(Precision)
    for name in precisions:
        if name not in known:
            raise UserError(f"--precision {name}: expected {' or '.join(known)}")
    chosen = [name for name in known if name in precisions or not precisions]
    found = [
        bench_sft(precision=precision, packing=packed, rounds=rounds, steps=steps, progress=echo)
        for precision in chosen
        for packed in ([False, True] if packing is None else [packing])
    ]
    for comparison in found:
        echo(comparison.as_markdown())
    if output is not None:
        write_comparisons(found, output, "sft")
    return found


def write_comparisons(found: Sequence[Comparison], folder: Path, name: str) -> None:
    """Write `name.json` (a list) and `name.md`, each whole."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", "[" + ",\n".join(comparison.as_json() for comparison in found) + "]\n")
    write_atomically(folder / f"{name}.md", "\n\n".join(comparison.as_markdown() for comparison in found) + "\n")
