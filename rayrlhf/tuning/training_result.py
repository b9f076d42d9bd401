"""Result of a finished tuning run, stored as `result.json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rayrlhf.storage.atomic import write_atomically
from rayrlhf.storage.notes import read_note, reading

FILE_NAME = "result.json"


@dataclass(frozen=True, slots=True)
class TuningResult:
    """Result of a finished run.

    Attributes:
        export: the trained model in Hugging Face format.
        steps: optimizer steps of the run.
        metrics: last training loss, and held-out metrics of the exported weights.
        seconds: wall time of the call that finished it, including start-up and export.
    """

    folder: Path
    export: Path
    steps: int
    metrics: Mapping[str, float]
    seconds: float

    def write(self) -> None:
        """Write `result.json` to the run folder; errors as `write_atomically`."""
        values = asdict(self) | {"folder": str(self.folder), "export": str(self.export), "metrics": dict(self.metrics)}
        write_atomically(self.folder / FILE_NAME, json.dumps(values, indent=1))


def read_result(folder: Path) -> TuningResult | None:
    """Return the result of a finished run in a folder, or None."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    remedy = "remove it, and the same command finishes the run again"
    values = read_note(path, remedy)
    with reading(path, remedy):
        # the folder may have been moved
        return TuningResult(folder, folder / "export", values["steps"], values["metrics"], values["seconds"])
