"""Ray job submission: submit a run, follow its log, stop it, resubmit it after failures.

Ray runs a job once; retries are the submitter's part. They are safe, because a run resumes from its last checkpoint.
"""

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rayrlhf.errors import ActorLostError, StoppedError, UserError
from rayrlhf.tools.launch.job_client import JobRequest

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

POLL_SECONDS = 1.0
AGENT_SECONDS = 180.0
"""Longest wait for the first job agent of a cluster that has just started."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def connect(address: str | None) -> Any:
    """Return a client of a cluster's job server.

    With RAY_AUTH_MODE=token the token comes from RAY_AUTH_TOKEN(_PATH) or ~/.ray/auth_token, never from arguments.

    Raises:
        UserError: no address, no response, or the token is wrong.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if address is None:
        raise UserError("no cluster: give --address URL (for example http://127.0.0.1:8265), or set RAY_API_SERVER_ADDRESS")
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address}: expected the dashboard's URL, for example http://127.0.0.1:8265")
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
