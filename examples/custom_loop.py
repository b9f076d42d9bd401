"""A PPO loop of your own in plain Python, in which a tiny model learns to write digits.

Run it with `python examples/custom_loop.py`: half a minute on two CPU cores.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import rayrlhf
from rayrlhf.data.records import Prompt, Rollout

CONFIG = {
    "run": {"name": "custom-loop", "steps": 4},
    "model": {"path": "builtin:tiny?layers=2&hidden=64&context=192"},
    "critic": {"kind": "shared"},
    "reward": {"given_by_loop": True},
    "data": {"train": {"path": "builtin:sums"}, "evaluation": {"path": "builtin:sums", "split": "evaluation"}},
    "evaluation": {"prompts": 32},
    "rollout": {"backend": "transformers", "prompts_per_step": 32, "max_new_tokens": 12},
    "train": {"learning_rate": 1.0e-3, "mini_batch_size": 16},
    "checkpoint": {"every": 0},
}


def digits(text: str) -> float:
    """Reward of a response: the share of its characters that are digits."""
    return sum(character.isdigit() for character in text) / max(len(text), 1)


def judge(prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[float]:
    """Rewards of held-out responses."""
    return [digits(rollout.text) for rollout in rollouts]


def main(root: Path) -> None:
    """Train, save, export and chat; a second call continues the run in `root`."""
    config = CONFIG | {"run": CONFIG["run"] | {"root": str(root)}}
    with rayrlhf.open_trainer(config) as trainer:
        before = trainer.evaluate(judge).mean_score
        for step in trainer.steps():
            with trainer.recovering():  # a lost policy is restored, and the step is repeated
                prompts = trainer.prompts()
                rollouts = trainer.generate(prompts)
                scored = trainer.score(prompts, rollouts)
                rewards = [digits(rollout.text) for rollout in scored.rollouts]
                metrics = trainer.step(scored, rewards)
                print(f"step {step + 1}: reward {sum(rewards) / len(rewards):.3f}, KL {metrics['objective/kl']:.3f} nats")
        after = trainer.evaluate(judge).mean_score
        print(f"held-out reward {before:.3f} -> {after:.3f}; model in {trainer.export()}")
        print(f"3 + 4 = ? {trainer.chat('3 + 4 =')}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
