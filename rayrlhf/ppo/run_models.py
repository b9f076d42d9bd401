"""Models of a run by role, and their checks before anything starts."""

from collections.abc import Iterator

from rayrlhf.actors.placement import Role
from rayrlhf.config.model import ModelSection
from rayrlhf.config.ppo import PPOConfig


def models_of(config: PPOConfig) -> dict[Role, ModelSection]:
    """Return the model of each role that has one; the first member of an ensemble."""
    models: dict[Role, ModelSection] = {"policy": config.model, "rollout": config.model}
    if config.critic.kind == "separate":
        models["critic"] = config.critic.model or config.model
    if config.needs_reference and not config.reference_in_policy:
        models["reference"] = config.reference.model or config.model
    if config.reward.model is not None:
        models["reward"] = config.reward.model.model
    return models


def check_models(config: PPOConfig) -> None:
    """Check the configurations of all models.

    Raises:
        UserError: a multimodal model, adapters that it cannot have, attention heads that the replicas cannot divide, or a
            configuration that cannot be read.
    """
    from rayrlhf.models.start_check import check_configuration, check_divides_heads

    for _, model in _different_models(config):
        check_configuration(model)
    check_divides_heads(config.model, config.rollout.tensor_parallel_size, "rollout.tensor_parallel_size")
    check_row_splits(config)


def check_row_splits(config: PPOConfig) -> None:
    """Check that ranks can share rows where the placement says so.

    Raises:
        UserError: see `check_row_split`.
    """
    from rayrlhf.models.skeleton import check_row_split

    models = models_of(config)
    for role, placement in (("policy", config.placement.policy), ("critic", config.placement.critic)):
        if role in models:
            check_row_split(models[role], f"placement.{role}.sequence_parallel", placement.sequence_parallel)


def describe_checks(config: PPOConfig) -> Iterator[str]:
    """Yield the outcome of the check of each different model, in words.

    Large models are left to the run.

    Raises:
        UserError: a model cannot be loaded, or is refused.
    """
    from rayrlhf.models.start_check import describe_check

    for role, model in _different_models(config):
        yield f"{role} model: {describe_check(model, frozenset({'value' if role in ('critic', 'reward') else 'lm'}))}"


def _different_models(config: PPOConfig) -> Iterator[tuple[Role, ModelSection]]:
    """Yield each model once, with its first role, and all members of an ensemble."""
    models: list[tuple[Role, ModelSection]] = [(role, model) for role, model in models_of(config).items() if role != "reward"]
    if config.reward.model is not None:
        models += [("reward", model) for model in config.reward.model.models]
    seen: set[tuple[str, str | None]] = set()
    for role, model in models:
        if (model.path, model.revision) not in seen:
            seen.add((model.path, model.revision))
            yield role, model
