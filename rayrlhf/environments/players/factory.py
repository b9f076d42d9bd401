"""Player factory: a rollout engine that plays the configured environment or agent."""

from dataclasses import replace

from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.engines.rollout.factory import build_rollout_engine


def build_player(spec: RolloutSpec) -> RolloutEngine:
    """Start the rollout engine of a spec, in a player if it has an environment.

    Raises:
        UserError: the backend is not installed, it cannot serve this model with these settings, or the environment is unknown.
    """
    if spec.environment is None:
        return build_rollout_engine(spec)
    from rayrlhf.environments.players.agent_player import AgentPlayer
    from rayrlhf.environments.players.agent_session import Texts
    from rayrlhf.environments.players.episode_player import EpisodePlayer
    from rayrlhf.environments.registry import find_agent
    from rayrlhf.models.load import load_tokenizer

    agent, tokenizer = find_agent(spec.environment), load_tokenizer(spec.model)
    modes = {"lockstep": spec.lockstep, "continues": spec.continues}
    if agent is None:
        return EpisodePlayer(build_rollout_engine(spec), spec.environment, tokenizer, **modes)
    texts = Texts.of(tokenizer, spec.rollout.tool_parser, spec.rollout.reasoning_parser)
    engine = build_rollout_engine(replace(spec, logprobs=True))  # an agent may ask for them
    return AgentPlayer(engine, agent, spec.environment, texts, **modes)
