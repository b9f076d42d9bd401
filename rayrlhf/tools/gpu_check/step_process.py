"""Process of one step: `python -m rayrlhf.tools.gpu_check.step_process FUNCTION DEVICE FILE`.

It appends a line of JSON to the file for its start, each figure, and its end. A crash of CUDA ends this process only.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rayrlhf.tools.gpu_check.step_result import measure, resolve

STARTED = "started"


def run(function: str, device: str, file: Path) -> None:
    """Run a step and write its lines."""
    import torch

    with file.open("a", encoding="utf-8", buffering=1) as out:

        def note(line: dict[str, Any]) -> None:
            out.write(json.dumps(line) + "\n")

        try:
            resolve(function)
        except (ImportError, AttributeError) as error:
            note({"status": "failed", "reason": f"{type(error).__name__}: {error}"})
            return
        note({STARTED: True})
        measure(function, torch.device(device), note)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
