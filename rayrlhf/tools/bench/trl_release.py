"""TRL's last release with a PPO trainer, in a folder of its own beside the installed packages it works with."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rayrlhf.errors import UserError
from rayrlhf.models.builtin import cache_folder
from rayrlhf.storage.atomic import folder_atomically

RELEASE = "1.12.0"


def installed_trl(progress: Callable[[str], None]) -> tuple[str, Path]:
    """Install the release where it is not yet, without its dependencies: both sides then run on the same torch.

    Returns:
        Its version, and the folder that holds it, for `PYTHONPATH`.

    Raises:
        UserError: pip could not install it.
    """
    folder = cache_folder() / "bench" / f"trl-{RELEASE}"
    if not folder.is_dir():
        progress(f"installing trl=={RELEASE} into {folder}")
        with folder_atomically(folder) as partial:
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(partial), f"trl=={RELEASE}"]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise UserError(f"bench ppo: pip could not install trl=={RELEASE}: {run.stderr.strip()[-300:]}")
    return RELEASE, folder
