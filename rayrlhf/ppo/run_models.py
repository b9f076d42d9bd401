"""Models of a run by role, and their checks before anything starts."""

from collections.abc import Iterator

from rayrlhf.actors.placement import Role
from rayrlhf.config.model import ModelSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.train import UNSHARED
from rayrlhf.errors import UserError


def models_of(config: PPOConfig) -> dict[Role, ModelSection]:
    """Return the model of each role that has one; the first member of an ensemble."""
    models: dict[Role, ModelSection] = {"policy": config.model, "rollout": config.model}
    if config.critic.kind == "separate":
        models["critic"] = config.critic.model or config.model
    if config.needs_reference and not config.reference_in_policy:
        models["reference"] = config.reference.model or config.model
    if config.teacher is not None:
        models["teacher"] = config.teacher.model
    if config.reward.model is not None:
        models["reward"] = config.reward.model.model
    if config.reward.judge is not None:
        models["judge"] = config.reward.judge.model
    return models


def check_models(config: PPOConfig) -> None:
    """Check the configurations of all models.

    Raises:
        UserError: a multimodal model, adapters that it cannot have, attention heads or layers that the replicas cannot split,
            a configuration that cannot be read, a role that cannot read the policy's samples, a reward model without a head, or
            a judge whose labels are not single tokens.
    """
    from rayrlhf.engines.scoring.judge_engine import check_judge
    from rayrlhf.engines.scoring.reward_model import check_reward_models
    from rayrlhf.models.router_load import check_router_loss
    from rayrlhf.models.routing_replay import check_routing_replay
    from rayrlhf.models.start_check import check_configuration, check_divides_heads, check_stages

    for _, model in _different_models(config):
        check_configuration(model)
    check_divides_heads(config.model, config.rollout.tensor_parallel_size, "rollout.tensor_parallel_size")
    check_stages(config.model, config.rollout.pipeline_parallel_size, "rollout.pipeline_parallel_size")
    if config.rollout.replays_routing:
        check_routing_replay(config.model)
    check_router_loss(config.model, config.train.router_aux_loss_coefficient)
    check_splits(config)
    check_readers(config)
    if config.reward.model is not None:
        check_reward_models(config.reward.model)
    check_judge(config.reward.judge)


def check_readers(config: PPOConfig) -> None:
    """Check that critic, reference and teacher read the policy's token ids as the policy does.

    Raises:
        UserError: the tokenizer of one has other tokens, or its model has no embedding of them or too few positions.
    """
    from rayrlhf.engines.rollout.common import context_length
    from rayrlhf.models.load import load_architecture, load_tokenizer

    readers = {role: model for role, model in models_of(config).items() if role in ("critic", "reference", "teacher")}
    for role, model in readers.items():
        if (model.path, model.revision) == (config.model.path, config.model.revision):
            continue
        policy = load_tokenizer(config.model).get_vocab()
        context = context_length(config.rollout, load_architecture(config.model))
        own = load_tokenizer(model).get_vocab()
        other = sum(own.get(token) != number for token, number in policy.items())
        if role == "teacher":  # its most likely tokens are learned
            other = other or len(own.keys() - policy.keys())
        if other:
            raise UserError(
                f"{role}.model.path {model.path}: its tokenizer has other token ids than that of model.path "
                f"{config.model.path} for {other} of {len(policy)} tokens; expected a {role} with the same tokenizer"
            )
        architecture = load_architecture(model)
        rows, positions = int(architecture.vocab_size), getattr(architecture, "max_position_embeddings", None)
        if rows < min(max(policy.values()) + 1, int(load_architecture(config.model).vocab_size)):
            raise UserError(
                f"{role}.model.path {model.path}: it has {rows} embeddings for the {len(policy)} tokens of the policy"
            )
        if positions is not None and positions < context:
            raise UserError(
                f"{role}.model.path {model.path}: it has {positions} positions, but prompt and response may have {context} "
                f"tokens; expected rollout.max_model_length <= {positions}"
            )


def check_splits(config: PPOConfig) -> None:
    """Check that ranks can share rows, weights or experts where the placement says so.

    Raises:
        UserError: see `check_rank_groups`.
    """
    from rayrlhf.models.skeleton import check_rank_groups

    models = models_of(config)
    for role, placement in (("policy", config.placement.policy), ("critic", config.placement.critic)):
        if role in models:
            check_rank_groups(models[role], f"placement.{role}", placement)


def describe_checks(config: PPOConfig) -> Iterator[str]:
    """Yield the outcome of the check of each different model, in words.

    Large models are left to the run.

    Raises:
        UserError: a model cannot be loaded, or is refused.
    """
    from rayrlhf.actors.role_specs import train_spec
    from rayrlhf.models.network_io import Head
    from rayrlhf.models.start_check import describe_check

    for role, model in _different_models(config):
        heads: frozenset[Head] = frozenset({"value" if role in ("critic", "reward") else "lm"})
        unshared = UNSHARED[config.train.share_prefixes]
        if role == "policy" or role == "critic":
            unshared = train_spec(config, role).unshared
        yield f"{role} model: {describe_check(model, heads, unshared=unshared)}"


def _different_models(config: PPOConfig) -> Iterator[tuple[Role, ModelSection]]:
    """Yield each model once, with its first role, and all members of an ensemble.

    A judge is checked only by its engine.
    """
    models: list[tuple[Role, ModelSection]] = [
        (role, model) for role, model in models_of(config).items() if role not in ("reward", "judge")
    ]
    if config.reward.model is not None:
        models += [("reward", model) for model in config.reward.model.models]
    seen: set[str] = set()
    for role, model in models:
        if (described := model.model_dump_json()) not in seen:
            seen.add(described)
            yield role, model
