"""Player factory: a rollout engine that plays the configured environment or agent."""

from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.engines.rollout.factory import build_rollout_engine


def build_player(spec: RolloutSpec) -> RolloutEngine:
    """Start the rollout engine of a spec, in a player if it has an environment.

    Raises:
        UserError: the backend is not installed, it cannot serve this model with these settings, or the environment is unknown.
    """
    engine = build_rollout_engine(spec)
    if spec.environment is None:
        return engine
    from rayrlhf.environments.players.agent_player import AgentPlayer
    from rayrlhf.environments.players.episode_player import EpisodePlayer
    from rayrlhf.environments.registry import find_agent
    from rayrlhf.models.load import load_tokenizer

    agent, tokenizer = find_agent(spec.environment), load_tokenizer(spec.model)
    modes = {"lockstep": spec.lockstep, "continues": spec.continues}
    if agent is None:
        return EpisodePlayer(engine, spec.environment, tokenizer, **modes)
    return AgentPlayer(engine, agent, spec.environment, tokenizer, stop=spec.rollout.stop, **modes)
