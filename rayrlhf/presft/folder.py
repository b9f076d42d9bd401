"""The run folder of Pre-SFT, and which settings may still change in it.

A folder belongs to one configuration, but a user is meant to stop after the scores, look at them, and then choose the cut. So a
section is fixed only once something has been made with it.
"""

from collections.abc import Callable

import yaml

from rayrlhf.config.load import differences, dump_config
from rayrlhf.config.presft import PreSFTConfig
from rayrlhf.data.atomic import write_atomically
from rayrlhf.observe.run_folder import RunFolder, open_run
from rayrlhf.presft.layout import Layout

FREE = ("run.rounds", "pipeline", "workers", "quality")
"""Keys and sections that change nothing of what was made."""
FIXED_ANYWAY = ("pipeline.rows_per_part",)
FREE_UNTIL_RELABELED = ("select", "relabel")


def open_presft(config: PreSFTConfig) -> RunFolder:
    """Create the run folder, or take up the run in it with the settings that may change.

    Raises:
        UserError: it holds a run with other settings that matter, no run but other files, or a process is running in it.
    """
    layout = Layout(config.run.folder)
    text = dump_config(config)
    folder = open_run(config.run.folder, text, _differences(layout), folders=())
    if folder.config.read_text(encoding="utf-8") != text:
        write_atomically(folder.config, text)
    return folder


def _differences(layout: Layout) -> Callable[[str, str], list[str]]:
    def compare(stored: str, wanted: str) -> list[str]:
        old, new = (PreSFTConfig.model_validate(yaml.safe_load(text)) for text in (stored, wanted))
        relabeled = bool(layout.round(1).relabeled.indices())
        return [line for line in differences(old, new) if not may_change(line.partition(":")[0], relabeled=relabeled)]

    return compare


def may_change(key: str, *, relabeled: bool) -> bool:
    """Whether a setting of a run that has begun may change; `relabeled` says that decisions were made."""
    free = FREE if relabeled else (*FREE, *FREE_UNTIL_RELABELED)
    return key not in FIXED_ANYWAY and any(f"{key}.".startswith(f"{prefix}.") for prefix in free)
