"""What tests of replays share."""

import contextlib

import pytest

from rayrlhf.ppo import replay


@contextlib.contextmanager
def keeping_actors(without=("rollout", "reward")):
    """Keep the actors of the first replay for those after it, which saves their start; each loads a checkpoint."""
    start, load, kept = replay.running_actor_groups, replay.load_models, []

    @contextlib.contextmanager
    def running(config, say, _):
        if not kept:
            kept.append(stack.enter_context(start(config, say, without)))
            load(kept[0], 300.0)
        yield kept[0]

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(replay, "running_actor_groups", running)
        patch.setattr(replay, "load_models", lambda *_: None)
        yield


def bits(outcome):
    """Verdicts of a replay, apart from that on two programs."""
    return {one.verdict for one in outcome.compared if one.item != replay.ENGINE}
