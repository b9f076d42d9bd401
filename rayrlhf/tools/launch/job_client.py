"""What is sent to a cluster for one run: entrypoint, working folder, environment, metadata. Pure, and none of it is secret."""

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
"""Left out of the upload (Ray takes 100 MiB at most): caches, run folders, weights, and what looks like a secret."""
SECRET = re.compile(r"(token|secret|password|api_?key|credential)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One run as a job.

    Attributes:
        run_name: the run's name, also the first part of the job's.
        entrypoint: the command line on the cluster.
        runtime_env: Ray's runtime environment.
        metadata: what lists of jobs show.
        entrypoint_cpus: CPUs that the driver asks for; with 0 it runs on the head.
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
        """Describe a run.

        Args:
            config: the run, loaded here so that mistakes are found before anything is uploaded.
            path: its file, inside `working_dir`.
            overrides: settings of the command line; part of the entrypoint, which everybody on the cluster can read.
            working_dir: folder that is uploaded and that the job runs in.
            entrypoint_cpus: CPUs that the driver asks for.
            stop_seconds: how long Ray waits between asking the run to stop and ending it.

        Raises:
            UserError: the file lies outside of the folder, or an override looks like a secret.
        """
        folder = working_dir.resolve()
        if not folder.is_dir():
            raise UserError(f"--working-dir {working_dir}: no such folder")
        try:
            inside = path.resolve().relative_to(folder)
        except ValueError as error:
            raise UserError(f"{path}: lies outside of --working-dir {working_dir}, which is all that is uploaded") from error
        for override in overrides:
            key, _, value = override.partition("=")
            if SECRET.search(key.rpartition(".")[2]) and not value.isdigit():
                raise UserError(f"{key}: the cluster shows a job's command to everybody; pass secrets through its environment")
        return cls(
            run_name=config.run.name,
            entrypoint=shlex.join(["rayrlhf", "ppo", inside.as_posix(), *overrides]),
            runtime_env={
                "working_dir": str(folder),
                "excludes": list(EXCLUDES),
                # Ray kills a stopped job after 3 seconds otherwise, in the middle of its checkpoint.
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_seconds), "PYTHONUNBUFFERED": "1"},
            },
            metadata={"run": config.run.name, "steps": str(config.run.steps), "seed": str(config.run.seed)},
            entrypoint_cpus=entrypoint_cpus,
        )
