"""Ray job submission: submit a run, follow its log, stop it, resubmit it after failures.

Ray runs a job once, so `submit` does the retries. They are safe, because a run resumes from its last checkpoint.
"""

import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import ActorLostError, StoppedError, UserError

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
    """One run as a Ray job: entrypoint, working folder, environment, metadata; without secrets.

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


if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

POLL_SECONDS = 1.0
AGENT_SECONDS = 180.0
"""Longest wait for the first job agent of a cluster that has just started."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def connect(address: str | None) -> Any:
    """Return a client of a cluster's job server.

    The token comes from RAY_AUTH_TOKEN(_PATH) or ~/.ray/auth_token, never from arguments. Where there is one, and RAY_AUTH_MODE
    is not set, it is sent over HTTPS and to this machine's own addresses.

    Raises:
        UserError: no address, no response, or the token is wrong.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if address is None:
        raise UserError("no cluster: give --address URL (for example http://127.0.0.1:8265), or set RAY_API_SERVER_ADDRESS")
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: expected the dashboard's URL, for example http://127.0.0.1:8265")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    place = urlsplit(address)
    if place.scheme == "https" or place.hostname in ("127.0.0.1", "localhost", "::1"):  # else a network would read the token
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        return JobSubmissionClient(address)
    except ConnectionError as error:
        raise UserError(f"{address}: no response from a Ray dashboard; is the tunnel or port-forward open?") from error
    except AuthenticationError as error:
        raise UserError(f"{address}: {_refusal(error.message)}") from error
    except RuntimeError as error:
        raise UserError(f"{address}: {_first_line(error)}") from error


def run_job(
    client: "JobSubmissionClient",
    request: JobRequest,
    submission_id: str | None,
    say: Callable[[str], None],
    *,
    wait: bool,
    retries: int,
) -> str:
    """Submit a run; returns the id of the last job.

    Args:
        client: of `connect`.
        submission_id: the job's name; None for the run's name with the time. Retries get `-retry-N`.
        say: called with lines for the user.
        wait: follow the log until the end.

    Raises:
        UserError: the name is taken, or the folder is too large to upload.
        ActorLostError: all attempts failed.
        StoppedError: the job was stopped.
    """
    first = submission_id or f"rayrlhf-{request.run_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in range(retries + 1):
        name = first if attempt == 0 else f"{first}-retry-{attempt}"
        _submit(client, request, name, attempt)
        say(f"submitted {name}")
        if not wait:
            return name
        status = follow(client, name, say)
        if status == "SUCCEEDED":
            return name
        if status == "STOPPED":
            raise StoppedError(f"job {name} was stopped; submit it again to resume")
        say(f"job {name} failed: {_reason(client, name)}")
    raise ActorLostError(f"job {first} failed {retries + 1} times; its log is above", first)


def follow(client: "JobSubmissionClient", name: str, say: Callable[[str], None]) -> str:
    """Follow a job's log until the job ends; returns its last status."""
    shown = 0
    while True:
        status = str(client.get_job_status(name).value)
        log = client.get_job_logs(name)
        end = len(log) if status in ENDED else log.rfind("\n") + 1
        for line in log[shown:end].splitlines():
            say(line)
        shown = max(shown, end)
        if status in ENDED:
            return status
        time.sleep(POLL_SECONDS)


def stop_job(client: "JobSubmissionClient", name: str, say: Callable[[str], None], seconds: float) -> None:
    """Stop a job and wait until it has written its checkpoint.

    Raises:
        UserError: no such job.
        ActorLostError: the job did not end within `seconds`.
    """
    try:
        client.stop_job(name)
    except RuntimeError as error:
        raise UserError(f"job {name}: {_first_line(error)}") from error
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status = str(client.get_job_status(name).value)
        if status in ENDED:
            say(f"job {name}: {status.lower()}; submit the same run again to resume it")
            return
        time.sleep(POLL_SECONDS)
    raise ActorLostError(f"job {name} did not end within {seconds:g} s after the stop request", name)


def _submit(client: "JobSubmissionClient", request: JobRequest, name: str, attempt: int) -> None:
    """Submit one job; a cluster whose agents still start gets `AGENT_SECONDS`."""
    end = time.monotonic() + AGENT_SECONDS
    while not _submitted(client, request, name, attempt, last=time.monotonic() >= end):
        time.sleep(POLL_SECONDS)


def _submitted(client: "JobSubmissionClient", request: JobRequest, name: str, attempt: int, *, last: bool) -> bool:
    try:
        client.submit_job(
            entrypoint=request.entrypoint,
            submission_id=name,
            runtime_env=request.runtime_env,
            metadata=request.metadata | {"attempt": str(attempt)},
            entrypoint_num_cpus=request.entrypoint_cpus or None,
        )
    except (RuntimeError, ValueError) as error:
        if "No available agent" in str(error) and not last:
            return False
        raise UserError(f"job {name} was rejected: {_first_line(error)}") from error
    return True


def _reason(client: "JobSubmissionClient", name: str) -> str:
    message = str(client.get_job_info(name).message or "no reason given")
    return message.strip().splitlines()[0]


def _refusal(text: str) -> str:
    """Return the meaning of an authentication error, with a remedy."""
    wrong = text.startswith("Authentication failed")
    code = "403: the token is not the cluster's" if wrong else "401: the cluster needs a token"
    return f"rejected with {code}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
