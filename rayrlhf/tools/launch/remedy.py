"""Smallest change that makes a run fit: the fewest settings, then the lowest cost.

Settings are tried in an engineer's order: first those that cost only time, last those that change the training. More machines
are suggested only if no settings help.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from rayrlhf.config.launch import NodeSection
from rayrlhf.config.loading.load import apply_override, load_tree
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.section import GIB
from rayrlhf.errors import UserError
from rayrlhf.tools.launch.launch_plan import USABLE, learning_shapes, plan_run
from rayrlhf.tools.launch.memory_plan import FLOAT

MAX_SETTINGS = 3
"""Maximum settings of a suggestion."""
LONG = 8192
"""Tokens of a response from which a suggestion may split rows over ranks; shorter rows fit into smaller micro-batches."""
MAX_NODES = 64
"""Maximum nodes of a suggestion."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change with which everything fits.

    Attributes:
        overrides: settings in command-line syntax.
        nodes: number of nodes; the current one unless no settings help.
    """

    overrides: tuple[str, ...]
    nodes: int


def find_remedy(config: PPOConfig, nodes: NodeSection) -> Remedy | None:
    """Search for the smallest change; None if there is none or none is needed."""
    if unloadable(config, nodes) is not None:
        return None
    count = nodes.count
    while count <= max(MAX_NODES, nodes.count):
        cluster = nodes.model_copy(update={"count": count})
        least = 0 if count > nodes.count else 1
        for options in (list(_options(config, cluster)), list(_adapted(config, cluster))):
            for size in range(least, MAX_SETTINGS + 1):
                for groups in combinations(options, size):
                    chosen = tuple(setting for group in groups for setting in group)
                    keys = {setting.partition("=")[0] for setting in chosen}
                    if len(keys) == len(chosen) and fits(config, cluster, chosen):
                        return Remedy(chosen, count)
        count *= 2
    return None


def unloadable(config: PPOConfig, nodes: NodeSection) -> str | None:
    """Return why no setting helps, or None.

    A rank loads the whole of a model with weights that transformers computes from others, before they are sharded.
    """
    limit = USABLE * nodes.gpu_memory_gib if nodes.gpus else USABLE * nodes.main_memory_gib
    for role, shape in learning_shapes(config).items():
        whole = (shape.frozen_bytes if shape.adapters else FLOAT * shape.parameters) / GIB
        if shape.converted and whole > limit:
            return f"each rank of the {role} loads the whole model before it is sharded: {whole:.1f} of {limit:.1f} GiB"
    return None


def fits(config: PPOConfig, nodes: NodeSection, overrides: tuple[str, ...] = ()) -> bool:
    """Return True if a run fits with these settings."""
    tree = config.model_dump(mode="json")
    try:
        for override in overrides:
            apply_override(tree, override)
        return not plan_run(load_tree(PPOConfig, tree, None, "plan"), nodes).problems
    except UserError:
        return False  # contradictory settings, or a placement that does not fit the machines


def _options(config: PPOConfig, nodes: NodeSection) -> Iterator[tuple[str, ...]]:
    """Yield groups of settings, cheapest first."""
    ranks = [role for role in ("policy", "critic") if role == "policy" or config.critic.kind == "separate"]
    for setting in _single(config, nodes):
        yield (setting,)
    for count in (2, 4, 8, 16, 32, 64):
        if config.placement.policy.ranks < count <= nodes.count * nodes.gpus:
            yield tuple(f"placement.{role}.ranks={count}" for role in ranks)
    for size in (2, 4, 8):
        if config.rollout.max_new_tokens >= LONG and config.placement.policy.sequence_parallel < size:
            yield tuple(f"placement.{role}.sequence_parallel={size}" for role in ranks)


def _adapted(config: PPOConfig, nodes: NodeSection) -> Iterator[tuple[str, ...]]:
    """Yield groups of settings with adapters, the last resort before more machines."""
    if config.model.lora is None:
        yield ("model.lora={rank: 16}",)
        yield from _options(config, nodes)


def _single(config: PPOConfig, nodes: NodeSection) -> Iterator[str]:
    train, rollout = config.train, config.rollout
    if not config.model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true"
    for part in (2, 4, 8):
        if train.micro_batch_size is None and train.micro_batch_tokens // part >= 256:
            yield f"train.micro_batch_tokens={train.micro_batch_tokens // part}"
    for share in (0.4, 0.3, 0.2, 0.15, 0.6, 0.7, 0.8, 0.9):
        if nodes.gpus:
            yield f"rollout.gpu_memory_utilization={share}"
    for gibibytes in (1.0, 0.5):
        if not nodes.gpus and gibibytes < rollout.memory_gib:
            yield f"rollout.memory_gib={gibibytes}"
    yield from (f"train.zero_stage={stage}" for stage in (1, 2, 3) if stage > train.zero_stage)
    if nodes.gpus and config.placement.mode == "colocated":
        yield "placement.mode=disaggregated"
    for devices in (2, 4, 8):
        if rollout.tensor_parallel_size < devices <= nodes.gpus:
            yield f"rollout.tensor_parallel_size={devices}"
    for stages in (2, 4):
        if nodes.gpus and rollout.pipeline_parallel_size < stages <= nodes.count:
            yield f"rollout.pipeline_parallel_size={stages}"
    if nodes.gpus and config.needs_reference and not config.reference_in_policy and not config.reference.offload:
        yield "reference.offload=true"
    if nodes.gpus and config.teacher is not None and not config.teacher.offload:
        yield "teacher.offload=true"
    if nodes.gpus and config.reward.model is not None and not config.reward.model.offload:
        yield "reward.model.offload=true"
    if not train.offload_optimizer:
        yield "train.offload_optimizer=true"


def advice(config: PPOConfig, nodes: NodeSection) -> str:
    """Return advice for a run that does not fit, in one line."""
    reason = unloadable(config, nodes)
    if reason is not None:
        return f"no setting helps: {reason}; use GPUs with more memory, or a smaller model"
    remedy = find_remedy(config, nodes)
    if remedy is None:
        return f"no change of up to {MAX_SETTINGS} settings and {MAX_NODES} nodes makes it fit"
    settings = " ".join(f"'{setting}'" if " " in setting else setting for setting in remedy.overrides)
    more = [f"--nodes {remedy.nodes}"] if remedy.nodes != nodes.count else []
    return f"smallest change that fits: {' '.join([*more, settings]).strip()}"
