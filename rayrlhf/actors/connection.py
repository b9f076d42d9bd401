"""The connection to a Ray cluster, and the actors of a run on it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from rayrlhf.actors.actor_groups import ActorGroups, read_cluster_resources, started_actor_groups
from rayrlhf.actors.placement import make_plan
from rayrlhf.actors.role_specs import RoleSpecs
from rayrlhf.config.ppo import PPOConfig

NAMESPACE = "rayrlhf"
"""Ray namespace of every actor, so that `ray list actors` tells them from others."""
CURRENT_CLUSTER = Path("/tmp/ray/ray_current_cluster")  # noqa: S108 - Ray's own file
"""Where Ray notes the address of the cluster that was started last on this machine."""
ANSWER_SECONDS = 3.0


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to the given cluster, the submitted job's own, the one that runs on this machine, or a new one for the block.

    A connection that exists already is used and left open.
    """
    if ray.is_initialized():
        yield
        return
    found = address or os.environ.get("RAY_ADDRESS") or ambient_address()
    ray.init(address=found, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    try:
        yield
    finally:
        ray.shutdown()


def ambient_address(note: Path = CURRENT_CLUSTER) -> str:
    """The address of a cluster that runs on this machine (`ray start`, `ray symmetric-run`), or `local` for a new one.

    A cluster that was killed leaves its note behind, and Ray itself would knock at that address for minutes and then give up.
    """
    try:
        host, _, port = note.read_text().strip().rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS):
            return f"{host}:{port}"
    except (OSError, ValueError):
        return "local"


@contextmanager
def running_actor_groups(config: PPOConfig) -> Iterator[ActorGroups]:
    """Start a run's processes on the connected cluster, without models yet; they end with the block."""
    specs = RoleSpecs(config, make_plan(config, read_cluster_resources()))
    with started_actor_groups(config.run.name, specs, config.deadlines.placement) as actor_groups:
        yield actor_groups
