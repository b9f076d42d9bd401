"""Ray job of a run: entrypoint, working folder, environment, metadata; without secrets."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError

EXCLUDES = (
    ".git/",
    ".venv/",
    "__pycache__/",
    "*.pyc",
    ".pytest_cache/",
    ".mypy_cache/",
    ".ruff_cache/",
    "runs/",
    "*.safetensors",
    "*.bin",
    "*.gguf",
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    "*token*.txt",
    "auth_token",
)
"""Files left out of the upload (Ray's limit is 100 MiB): caches, run folders, weights, possible secrets."""
SECRET = re.compile(r"(token|secret|password|api_?key|credential)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One run as a job.

    Attributes:
        run_name: the run's name, part of the job's name.
        entrypoint: the command line on the cluster.
        metadata: shown in lists of jobs.
        entrypoint_cpus: CPUs that the driver requests; with 0 it runs on the head.
    """

    run_name: str
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    entrypoint_cpus: float

    @classmethod
    def of(
        cls,
        config: PPOConfig,
        path: Path,
        overrides: Sequence[str],
        working_dir: Path,
        entrypoint_cpus: float = 0.0,
        stop_seconds: int = 600,
    ) -> Self:
        """Describe a run as a job.

        Args:
            config: the run, loaded here so that errors are found before the upload.
            path: its file, inside `working_dir`.
            overrides: settings of the command line; part of the entrypoint, which all users of the cluster can read.
            working_dir: folder that is uploaded and in which the job runs.
            stop_seconds: seconds between Ray's stop signal and killing the run.

        Raises:
            UserError: the file is outside of the folder, or an override looks like a secret.
        """
        folder = working_dir.resolve()
        if not folder.is_dir():
            raise UserError(f"--working-dir {working_dir}: no such folder")
        try:
            inside = path.resolve().relative_to(folder)
        except ValueError as error:
            raise UserError(f"{path}: is outside of --working-dir {working_dir}; only that folder is uploaded") from error
        for override in overrides:
            key, _, value = override.partition("=")
            if SECRET.search(key.rpartition(".")[2]) and not value.isdigit():
                raise UserError(f"{key}: a job's command is visible to all users; pass secrets through the environment")
        return cls(
            run_name=config.run.name,
            entrypoint=shlex.join(["rayrlhf", "ppo", inside.as_posix(), *overrides]),
            runtime_env={
                "working_dir": str(folder),
                "excludes": list(EXCLUDES),
                # Otherwise Ray kills a stopped job after 3 seconds, in the middle of its checkpoint.
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_seconds), "PYTHONUNBUFFERED": "1"},
            },
            metadata={"run": config.run.name, "steps": str(config.run.steps), "seed": str(config.run.seed)},
            entrypoint_cpus=entrypoint_cpus,
        )
