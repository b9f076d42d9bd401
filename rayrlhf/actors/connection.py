"""Connection to a Ray cluster, and the actors of a run on it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray

from rayrlhf.actors.actor_groups import ActorGroups, read_cluster_resources, started_actor_groups
from rayrlhf.actors.placement import make_plan
from rayrlhf.actors.role_specs import RoleSpecs
from rayrlhf.config.ppo import PPOConfig

NAMESPACE = "rayrlhf"
"""Ray namespace of every actor, which sets them apart in `ray list actors`."""
ANSWER_SECONDS = 3.0


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster for the block.

    In this order: `address`, the submitted job's cluster, the one on this machine, a new one. An existing connection is used
    and left open.
    """
    if ray.is_initialized():
        yield
        return
    found = address or os.environ.get("RAY_ADDRESS") or ambient_address()
    ray.init(address=found, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    if found == "local":
        _hide_cluster(ray.get_runtime_context().gcs_address)
    try:
        yield
    finally:
        ray.shutdown()


def cluster_file() -> Path:
    """Return Ray's file with the address of this machine's newest cluster."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray", "ray_current_cluster")  # noqa: S108


def _hide_cluster(address: str) -> None:
    """Remove the file of a cluster that ends with this run, before another joins it."""
    with suppress(OSError):
        if cluster_file().read_text().strip() == address:
            cluster_file().unlink()


def ambient_address(file: Path | None = None) -> str:
    """Return the address of this machine's running cluster, or `local` for a new one.

    Such a cluster comes from `ray start` or `ray symmetric-run`. A cluster that was killed leaves the file behind, and Ray
    itself would try that address for minutes and then fail.
    """
    try:
        host, _, port = (file or cluster_file()).read_text().strip().rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS):
            return f"{host}:{port}"
    except (OSError, ValueError):
        return "local"


@contextmanager
def running_actor_groups(config: PPOConfig) -> Iterator[ActorGroups]:
    """Start a run's processes without their models; they end with the block."""
    specs = RoleSpecs(config, make_plan(config, read_cluster_resources()))
    with started_actor_groups(config.run.name, specs, config.deadlines.placement) as actor_groups:
        yield actor_groups
