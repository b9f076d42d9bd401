"""The report of a Pre-SFT run from its folder alone, as `rayrlhf report RUN` asks for it; nothing in the folder is locked."""

import json
from pathlib import Path

from rayrlhf.config.load import load_config
from rayrlhf.config.presft import PreSFTConfig
from rayrlhf.errors import UserError
from rayrlhf.presft.layout import Layout
from rayrlhf.presft.report import write_report


def write_presft_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page from the datasheet that the run wrote last; returns its path.

    Args:
        folder: the run folder.
        output: the file; `report.html` in the run folder when None.

    Raises:
        UserError: there is no datasheet yet, or it or the configuration is damaged.
    """
    sheet = folder / "datasheet.json"
    if not sheet.is_file():
        raise UserError(f"{folder}: no datasheet.json yet, so nothing to report; `rayrlhf presft report CONFIG` makes both")
    try:
        figures = json.loads(sheet.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{sheet}: not JSON: {error}; `rayrlhf presft report CONFIG` writes it anew") from error
    config = load_config(PreSFTConfig, folder / "config.yaml")
    return write_report(config, Layout(folder), figures, output)
