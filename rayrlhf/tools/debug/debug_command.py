"""`rayrlhf debug`: one page and one archive about a run that hangs or died."""

import io
import tarfile
import time
from pathlib import Path
from typing import Annotated

import typer

PAGE = "debug.html"


def write_debug(folder: Path, output: Path | None = None) -> tuple[Path, Path]:
    """Write the page and the archive, which holds the page too; returns both paths.

    Args:
        folder: the run folder; apart from the default output it is only read.
        output: the archive; `debug.tar.gz` in the run folder when None. The page is written next to it.

    Raises:
        UserError: the folder holds no run, or a file cannot be written.
    """
    from rayrlhf.observe.html.page import render
    from rayrlhf.storage.atomic import file_atomically, write_atomically, writing
    from rayrlhf.tools.debug.debug_facts import collect
    from rayrlhf.tools.debug.debug_page import page_of

    facts = collect(folder)
    archive = output or folder / "debug.tar.gz"
    page, name = archive.with_name(PAGE), archive.name.partition(".")[0]
    content = render(*page_of(facts))
    with writing(archive):
        write_atomically(page, content)
        with file_atomically(archive) as partial, tarfile.open(partial, "w:gz") as file:
            for member, text in {PAGE: content, **facts.files}.items():
                data = text.encode("utf-8", "replace")
                entry = tarfile.TarInfo(f"{name}/{member}")
                entry.size, entry.mtime = len(data), int(time.time())
                file.addfile(entry, io.BytesIO(data))
    return page, archive


def debug(
    run: Annotated[Path, typer.Argument(help="The folder of a run: running, hanging, or ended.")],
    output: Annotated[
        Path | None, typer.Option(help="The archive to write; `debug.tar.gz` in the run folder if not given.")
    ] = None,
) -> None:
    """Collect stacks, logs, memory and settings of a run for a bug report, without secrets."""
    page, archive = write_debug(run, output)
    typer.echo(f"page: {page}\narchive: {archive}\nKnown secrets are removed; look through it before you publish it.")
