"""Placement and memory plan of a run on a cluster, with problems.

A pure function of the configuration, the machines and the shapes of the models; only `read_shape` reads files.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from rayrlhf.actors.placement import ClusterResources, Role, make_plan
from rayrlhf.config.judge import JudgeSection
from rayrlhf.config.launch import NodeSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.rank_groups import shared_parts, weight_parts
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.config.runtime import TrainPlacement
from rayrlhf.config.section import GIB
from rayrlhf.models.logit_chunks import chunk_bytes
from rayrlhf.ppo.run_models import check_splits, models_of
from rayrlhf.tools.launch.memory_plan import (
    FLOAT,
    Memory,
    Precision,
    cache_bytes_per_token,
    cut_on_load,
    frozen_memory,
    in_one_process,
    offloaded_between_turns,
    rollout_memory,
    sync_bytes,
    train_memory,
)
from rayrlhf.tools.launch.model_shape import ModelShape, cut_shape, read_shape, stage_shape
from rayrlhf.tools.launch.role_layout import Place, lay_out

USABLE = 0.95
"""Usable share of a memory: Ray kills processes beyond it on a node, and GPU allocators lose some to fragmentation."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Placement and memory of one run.

    Attributes:
        nodes: the machines.
        places: placement of every process.
        memory: of one process of each role; per device for rollout on GPUs.
        problems: one line for each part that does not fit; empty if everything fits.
        sync: bytes that a weight sync sends to each node with a replica.
        cache_tokens: capacity of a replica's KV cache in tokens.
        longest: maximum tokens of prompt and response.
        groups: ranks that share rows or weights, by role in training.
    """

    nodes: NodeSection
    places: tuple[Place, ...]
    memory: Mapping[Role, Memory]
    problems: tuple[str, ...]
    sync: int
    cache_tokens: int
    longest: int
    groups: Mapping[Role, TrainPlacement]

    def lines(self) -> Iterator[str]:
        """Yield the plan as text."""
        nodes = self.nodes
        kind = f"{nodes.gpus} GPUs of {nodes.gpu_memory_gib:g} GiB" if nodes.gpus else "no GPUs"
        yield f"cluster: {nodes.count} x ({nodes.cpus} CPUs, {nodes.main_memory_gib:g} GiB, {kind})"
        for role, memory in self.memory.items():
            mine = [place for place in self.places if place.role == role]
            shared = shared_parts(self.groups[role]) if role in self.groups else ""
            count = len({place.rank for place in mine})
            yield f"{role}: {count} x {memory.total / GIB:.1f} GiB ({memory.describe()}) on {_where(mine)}{shared}"
        sequences = self.cache_tokens // self.longest
        yield f"KV cache of a replica: {self.cache_tokens} tokens, {sequences} samples of {self.longest}"
        replicas = {place.node for place in self.places if place.role == "rollout"}
        learner = {place.node for place in self.places if place.role == "policy" and place.rank == 0}
        network = len(replicas - learner) * self.sync / GIB
        yield f"weight sync: {self.sync / GIB:.2f} GiB into each of {len(replicas)} nodes, {network:.2f} GiB over the network"
        yield from (f"does not fit: {problem}" for problem in self.problems)
        if not self.problems:
            yield "everything fits"


def plan_run(config: PPOConfig, nodes: NodeSection) -> RunPlan:
    """Plan a run without starting anything.

    Raises:
        UserError: a model's configuration cannot be read, its rows or weights cannot be split, or the cluster has too few CPUs
            or GPUs for the placement.
    """
    machine = ClusterResources((float(nodes.cpus),) * nodes.count, (float(nodes.gpus),) * nodes.count)
    check_splits(config)
    resources = make_plan(config, machine)
    places = lay_out(resources, machine)
    shapes = {role: _shape(model) for role, model in models_of(config).items()}
    precision = _precision(config.model, nodes)
    longest = _longest(config, shapes["policy"])
    cache = _cache_bytes(config.rollout, nodes, shapes["policy"], precision, longest)
    hosts = len(resources.workers["rollout"][0].bundles)
    memory = {
        role: _replica_memory(config, shapes["policy"], nodes, max(cache, 0), hosts)
        if role == "rollout"
        else _memory(config, role, len(workers), shapes.get(role), nodes, longest)
        for role, workers in resources.workers.items()
    }
    cache_tokens = max(cache, 0) // cache_bytes_per_token(shapes["policy"], precision)
    sync = sync_bytes(shapes["policy"], precision)
    problems = [*_device_problems(places, memory, nodes), *_node_problems(places, memory, nodes)]
    if cache_tokens < longest:
        problems.append(f"a replica's KV cache holds {cache_tokens} tokens, one sample may have {longest}")
    if config.reward.judge is not None:
        problems += _judge_problems(config.reward.judge, nodes, shapes["judge"])
    groups: dict[Role, TrainPlacement] = {"policy": config.placement.policy, "critic": config.placement.critic}
    return RunPlan(nodes, places, memory, tuple(problems), sync, cache_tokens, longest, groups)


def learning_shapes(config: PPOConfig) -> dict[Role, ModelShape]:
    """Return the shapes of the trained models."""
    return {role: _shape(model) for role, model in models_of(config).items() if role in ("policy", "critic")}


def _shape(model: ModelSection) -> ModelShape:
    lora = None if model.lora is None else model.lora.model_dump_json()
    return _cached_shape(model.model_dump_json(include={"path", "revision", "trust_remote_code"}), lora)


@lru_cache(maxsize=64)
def _cached_shape(model: str, lora: str | None) -> ModelShape:
    section = ModelSection.model_validate_json(model)
    if lora is None:
        return read_shape(section)
    return read_shape(ModelSection.model_validate_json(f'{model[:-1]}, "lora": {lora}}}'))


def _precision(model: ModelSection, nodes: NodeSection) -> Precision:
    """Return the compute precision; `auto` on CPUs counts as float32, the larger one."""
    if model.dtype == "auto":
        return Precision(2 if nodes.gpus else FLOAT)
    return Precision(2 if model.dtype == "bfloat16" else FLOAT)


def _longest(config: PPOConfig, shape: ModelShape) -> int:
    if config.rollout.max_model_length is not None:
        return config.rollout.max_model_length
    prompt = config.data.max_prompt_tokens
    return shape.context if prompt is None else min(shape.context, prompt + config.rollout.max_new_tokens)


def _judge_cache(judge: JudgeSection, nodes: NodeSection, shape: ModelShape) -> int:
    """Return the KV cache of a judge's replica in bytes over all devices, as `_cache_bytes`."""
    return _cache_bytes(judge.engine, nodes, shape, _precision(judge.model, nodes), judge.max_model_length or shape.context)


def _judge_problems(judge: JudgeSection, nodes: NodeSection, shape: ModelShape) -> Iterator[str]:
    """Yield a line if a judge's KV cache does not hold its longest question.

    vLLM refuses such an engine.
    """
    need = judge.max_model_length or shape.context
    tokens = max(_judge_cache(judge, nodes, shape), 0) // cache_bytes_per_token(shape, _precision(judge.model, nodes))
    if tokens < need:
        memory = "gpu_memory_utilization" if nodes.gpus else "memory_gib"
        yield (
            f"a judge's KV cache holds {tokens} tokens, a question may have {need} (reward.judge.max_model_length, "
            f"reward.judge.{memory})"
        )


def _cache_bytes(rollout: RolloutSection, nodes: NodeSection, shape: ModelShape, precision: Precision, longest: int) -> int:
    """Return a replica's KV cache in bytes over all devices; negative if nothing fits."""
    if nodes.gpus:
        devices, stage = rollout.tensor_parallel_size, stage_shape(shape, rollout.pipeline_parallel_size)
        rest = rollout_memory(stage, precision, devices=devices, cache=0).total
        free = devices * int(rollout.gpu_memory_utilization * nodes.gpu_memory_gib * GIB - rest)
        return free * shape.layers // stage.layers
    useful = (rollout.max_concurrent + 1) * (longest + 32) * cache_bytes_per_token(shape, precision)
    return min(int(rollout.memory_gib * GIB), useful)


def _memory(config: PPOConfig, role: Role, ranks: int, shape: ModelShape | None, nodes: NodeSection, longest: int) -> Memory:
    """Return the memory of one process of a role other than rollout."""
    train, model = config.train, models_of(config).get(role)
    if shape is None or model is None:
        return Memory(overhead=GIB // 2)  # Python, Ray and reward functions; never on a GPU
    precision = _precision(model, nodes)
    gpu = bool(nodes.gpus)
    chunk = chunk_bytes(int(nodes.gpu_memory_gib * GIB) if gpu else None)
    if role == "reward" and config.reward.model is not None and config.reward.model.backend == "vllm":
        return rollout_memory(shape, precision, devices=1, cache=config.reward.model.cache_bytes)
    if role == "reward" and config.reward.model is not None:
        members = [
            frozen_memory(
                _shape(one), _precision(one, nodes), tokens=max(train.score_batch_tokens, longest), gpu=gpu, chunk=chunk
            )
            for one in config.reward.model.models
        ]
        if nodes.gpus and config.reward.model.offload:
            largest = max(members, key=lambda member: member.total)  # members run one after the other, and wait on the host
            return offloaded_between_turns(replace(largest, host=sum(member.host for member in members)))
        return in_one_process(members)
    if role == "judge" and config.reward.judge is not None:
        devices = config.reward.judge.tensor_parallel_size if nodes.gpus else 1
        cache = _judge_cache(config.reward.judge, nodes, shape)
        return rollout_memory(shape, precision, devices=devices, cache=max(cache, 0))
    if role in ("reference", "teacher"):
        memory = frozen_memory(shape, precision, tokens=max(train.score_batch_tokens, longest), gpu=gpu, chunk=chunk)
        section = config.teacher if role == "teacher" and config.teacher is not None else config.reference
        return offloaded_between_turns(memory) if nodes.gpus and section.offload else memory
    from rayrlhf.models.sequence_parallel import key_copies

    placement = config.placement.policy if role == "policy" else config.placement.critic
    size, parts, divided = placement.sequence_parallel, weight_parts(placement), train.all_ranks_must_forward
    own = cut_shape(shape, placement.tensor_parallel, placement.expert_parallel)
    samples = -(-config.mini_batch_size // placement.data_ranks)
    if train.micro_batch_size is not None:
        tokens = min(train.micro_batch_size, samples) * longest
    else:
        tokens = min(max(train.micro_batch_tokens, longest), samples * longest)
    memory = train_memory(
        replace(own, key_value=own.key_value * key_copies(*shape.heads, size)),
        train,
        precision,
        ranks=ranks if divided else ranks // parts,
        tokens=-(-tokens // size),
        checkpointing=model.gradient_checkpointing,
        language=role == "policy",
        states=0 if train.optimizer.name == "sgd" else 2,
        gpu=gpu,
        chunk=chunk,
        uncut=shape if divided else None,
    )
    return memory if parts == 1 or divided else cut_on_load(memory, shape, language=role == "policy", gpu=gpu)


def _replica_memory(config: PPOConfig, shape: ModelShape, nodes: NodeSection, cache: int, hosts: int) -> Memory:
    """Return the memory of a replica per GPU, or on CPUs per node.

    On CPUs one memory holds all parts.

    Args:
        cache: bytes of its KV cache over all devices.
        hosts: number of its nodes.
    """
    rollout, precision = config.rollout, _precision(config.model, nodes)
    devices, stages = (rollout.tensor_parallel_size, rollout.pipeline_parallel_size) if nodes.gpus else (1, hosts)
    stage = stage_shape(shape, stages)
    memory = rollout_memory(stage, precision, devices=devices, cache=-(-cache * stage.layers // shape.layers))
    opponent = _shape(config.reference.model or config.model).parameters if config.opponent_share else 0
    return replace(memory, weights=memory.weights + precision.size * opponent)


def _device_problems(places: tuple[Place, ...], memory: Mapping[Role, Memory], nodes: NodeSection) -> Iterator[str]:
    load: dict[tuple[int, int], list[Role]] = defaultdict(list)
    for place in places:
        for device in place.devices:
            load[place.node, device].append(place.role)
    limit = USABLE * nodes.gpu_memory_gib
    reported: set[tuple[Role, ...]] = set()
    for (node, device), roles in load.items():
        # Roles on one device score one after the other, so only the largest offloaded one is on it at a time.
        always = sum(memory[role].total - memory[role].by_turns for role in roles)
        total = (always + max(memory[role].by_turns for role in roles)) / GIB
        if total > limit and tuple(roles) not in reported:
            reported.add(tuple(roles))  # other devices with the same roles have the same problem
            parts = ", ".join(f"{role} {memory[role].total / GIB:.1f}" for role in roles)
            yield f"node {node} GPU {device}: {total:.1f} of {limit:.1f} GiB ({parts})"


def _node_problems(places: tuple[Place, ...], memory: Mapping[Role, Memory], nodes: NodeSection) -> Iterator[str]:
    """Yield problems of main memory: CPU processes, and host memory of others during loading."""
    limit = USABLE * nodes.main_memory_gib
    for node in range(nodes.count):
        mine = [place for place in places if place.node == node]
        total = sum(memory[place.role].host if place.devices else memory[place.role].total for place in mine) / GIB
        if total > limit:
            yield f"node {node}: {total:.1f} of {limit:.1f} GiB of main memory while {len(mine)} processes load"
            return  # the other nodes are equal


def _where(places: list[Place]) -> str:
    """Return nodes and GPUs as text, such as `node 0 GPUs 0-7`."""
    by_node: dict[int, set[int]] = defaultdict(set)
    for place in places:
        by_node[place.node] |= set(place.devices)
    return ", ".join(f"node {node}{_span(devices)}" for node, devices in sorted(by_node.items()))


def _span(devices: set[int]) -> str:
    if not devices:
        return ""
    low, high = min(devices), max(devices)
    if len(devices) == 1:
        return f" GPU {low}"
    if len(devices) == high - low + 1:
        return f" GPUs {low}-{high}"
    return " GPUs " + ",".join(map(str, sorted(devices)))
