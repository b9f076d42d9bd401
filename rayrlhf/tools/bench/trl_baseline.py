"""TRL's last release with a PPO trainer, installed in a separate folder."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from rayrlhf.errors import UserError
from rayrlhf.models.builtin import cache_folder
from rayrlhf.storage.atomic import folder_atomically
from rayrlhf.tools.bench.work import PPOWork

RELEASE = "1.12.0"


def installed_trl(progress: Callable[[str], None]) -> tuple[str, Path]:
    """Install the release if missing, without dependencies, so that both use the same torch.

    Returns:
        Its version, and its folder, for `PYTHONPATH`.

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


def run_trl(work: PPOWork, folder: Path) -> float:
    """Run TRL's trainer with its own release first on the path; returns steps per hour."""
    script = Path(__file__).with_name("trl_ppo.py")
    job = json.dumps(asdict(work) | {"token_ids": work.token_ids()})
    environment = os.environ | {"PYTHONPATH": str(folder), "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, str(script)], input=job, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"TRL's trainer ended with {run.returncode}: {run.stderr[-2000:]}")
    return 3600 / float(np.median(json.loads(run.stdout.splitlines()[-1])))
