"""Connection to a Ray cluster, and the actors of a run on it."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partialmethod
from pathlib import Path
from threading import current_thread, main_thread
from unittest.mock import patch

import ray

from rayrlhf.actors.actor_groups import ActorGroups, read_cluster_resources, started_actor_groups
from rayrlhf.actors.placement import Role, make_plan, without_roles
from rayrlhf.actors.role_specs import RoleSpecs
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError
from rayrlhf.observe.host_limits import check_host_limits, temporary_folder
from rayrlhf.observe.stacks import write_on_signal

NAMESPACE = "rayrlhf"
"""Ray namespace of every actor, which sets them apart in `ray list actors`."""
ANSWER_SECONDS = 3.0
JOB_STOP_SECONDS = 600
"""Time that a stopped Ray job gets to write its checkpoint."""
_JOB, _STOP_WAIT = "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_STOP_WAIT_TIME_S"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""Start of an HTTP/2 connection with empty settings, which Ray's server returns with settings of its own."""


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster for the block.

    In this order: `address`, the submitted job's cluster, the one on this machine, a new one. An existing connection is used
    and left open.

    Raises:
        UserError: no Ray cluster responds at a given address, or a limit of this machine is too low for a new one.
    """
    write_on_signal()
    if ray.is_initialized():
        _give_job_time()
        yield
        return
    given = address or os.environ.get("RAY_ADDRESS")
    if given and ":" in given and "://" not in given and not is_cluster(given):
        name = "the configured address" if address else "RAY_ADDRESS"
        raise UserError(
            f"{name} {given}: no Ray cluster responds there; start it, or leave the address out for one of this machine"
        )
    found = given or ambient_address()
    if found == "local":
        check_host_limits()
        if os.environ.get("RAY_AUTH_MODE") != "disabled":
            make_token_private()
    with _signals_for_driver_only():
        ray.init(address=found, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    try:
        if found == "local":
            _hide_cluster(ray.get_runtime_context().gcs_address)
        _give_job_time()
        yield
    finally:
        ray.shutdown()


def _give_job_time() -> None:
    """Give this process's Ray job time to end after `ray job stop`.

    Its supervisor, an actor, kills it after 3 s unless it has `RAY_JOB_STOP_WAIT_TIME_S` in its environment, which it reads on
    that stop.
    """
    if _JOB not in os.environ or _STOP_WAIT in os.environ:
        return

    def wait(supervisor: object, name: str, seconds: int) -> None:
        import os  # sent by value: the supervisor may lack this package

        os.environ.setdefault(name, str(seconds))

    try:
        name = json.loads(os.environ[_JOB])["metadata"]["job_submission_id"]
        supervisor = ray.get_actor(f"_ray_internal_job_actor_{name}", namespace="SUPERVISOR_ACTOR_RAY_NAMESPACE")
        ray.get(supervisor.__ray_call__.remote(wait, _STOP_WAIT, JOB_STOP_SECONDS), timeout=30.0)
    except (ValueError, KeyError, TypeError, AttributeError, ray.exceptions.RayError):
        line = (
            "Ray job: `ray job stop` kills it 3 s after the signal, before a checkpoint is written, unless the runtime "
            f"environment sets {_STOP_WAIT} (`rayrlhf submit` does)"
        )
        print(line, file=sys.stderr)  # noqa: T201 - a line of the job's log


def cluster_file() -> Path:
    """Return Ray's file with the address of this machine's newest cluster."""
    return temporary_folder() / "ray" / "ray_current_cluster"


def _hide_cluster(address: str) -> None:
    """Remove the file of a cluster that ends with this run, before another joins it."""
    with suppress(OSError):
        if cluster_file().read_text().strip() == address:
            cluster_file().unlink()


@contextmanager
def _signals_for_driver_only() -> Iterator[None]:
    """Start processes in sessions of their own, and keep the signal handlers of this process.

    `timeout`, Slurm and terminals signal the whole process group. Ray's processes would end with the driver, which then could
    not write a checkpoint. They still end with it: the kernel kills them when their parent is gone.
    """
    before = signal.getsignal(signal.SIGTERM)
    with patch.object(subprocess.Popen, "__init__", partialmethod(subprocess.Popen.__init__, start_new_session=True)):
        yield
    if current_thread() is main_thread():
        signal.signal(signal.SIGTERM, before)


def ambient_address(file: Path | None = None) -> str:
    """Return the address of this machine's running cluster, or `local` for a new one.

    Such a cluster comes from `ray start` or `ray symmetric-run`. A cluster that was killed leaves the file behind, and another
    service may have its port by now. Ray itself would try that address for minutes, or without end.
    """
    try:
        address = (file or cluster_file()).read_text().strip()
    except (OSError, ValueError):
        return "local"
    return address if is_cluster(address) else "local"


def is_cluster(address: str) -> bool:
    """Return True if a Ray cluster, or another HTTP/2 server, responds at host:port within seconds."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return True
            connection.sendall(_HELLO)
            head = b""
            while len(head) < 4 and (received := connection.recv(9)):
                head += received
            return head[3:4] == b"\x04"
    except (OSError, ValueError):
        return False


def make_token_private() -> None:
    """Make Ray's token file readable only by this user; create it if missing.

    Ray would create it with the permissions of the umask, and the token is a right to run code as this user.
    """
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").expanduser()
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with suppress(OSError):  # Ray reports a home folder that cannot be written
        if path.exists():
            path.chmod(0o600)
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):  # another process was first
            os.link(partial, path)
        partial.unlink()


@contextmanager
def running_actor_groups(
    config: PPOConfig, say: Callable[[str], None] = lambda line: None, without: Collection[Role] = ()
) -> Iterator[ActorGroups]:
    """Start a run's processes without their models; they end with the block.

    Args:
        config: of the run.
        say: called with a line if the run waits for CPUs or GPUs.
        without: roles to leave out.
    """
    specs = RoleSpecs(config, without_roles(make_plan(config, read_cluster_resources()), without))
    seconds = config.deadlines.placement or config.placement.wait_seconds
    with started_actor_groups(config.run.name, specs, seconds, say) as actor_groups:
        yield actor_groups
