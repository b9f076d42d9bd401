"""The connection to a Ray cluster, and the actors of a run on it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from rayrlhf.actors.crew import Crew, read_machine, started_crew
from rayrlhf.actors.placement import make_plan
from rayrlhf.actors.specs import RoleSpecs
from rayrlhf.config.ppo import PPOConfig

NAMESPACE = "rayrlhf"
"""Ray namespace of every actor, so that `ray list actors` tells them from others."""


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to the given cluster, the submitted job's own, or a new local one that ends with the block.

    A connection that exists already is used and left open.
    """
    if ray.is_initialized():
        yield
        return
    ray.init(address=address or os.environ.get("RAY_ADDRESS"), namespace=NAMESPACE, log_to_driver=False, logging_level="error")
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def running_crew(config: PPOConfig) -> Iterator[Crew]:
    """Start a run's processes on the connected cluster, without models yet; they end with the block."""
    specs = RoleSpecs(config, make_plan(config, read_machine()))
    with started_crew(config.run.name, specs, config.deadlines.placement) as crew:
        yield crew
