"""Which metrics a page draws, in which order, and what each says in plain words. A run shows those it has."""

from dataclasses import dataclass

STEP_TIME, EPISODES, SYNC_VERSION = "time/step", "episode", "sync/version"
SECONDS_PER_RESPONSE = "derived/seconds_per_response"
STALENESS = "derived/staleness"


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric to draw: its name, the chart's title, the unit of its axis, and what it says."""

    metric: str
    title: str
    unit: str
    words: str


@dataclass(frozen=True, slots=True)
class CurveGroup:
    """Curves under one heading. `prefixes`: further metrics that begin so are drawn too, under their own names."""

    heading: str
    curves: tuple[Curve, ...]
    prefixes: tuple[str, ...] = ()


GROUPS = (
    CurveGroup(
        "Reward and quality",
        (
            Curve("objective/scores", "Score", "score", "Mean score of the sampled responses, before the KL penalty."),
            Curve("evaluation/score", "Held-out score", "score", "Mean score of the answers to held-out prompts."),
            Curve("objective/rlhf_reward", "Score less KL penalty", "score", "What the policy is trained on."),
            Curve("ppo/std_scores", "Spread of the scores", "score", "Standard deviation; near 0 nothing can be learned."),
            Curve("loss", "Training loss", "nats a token", "Loss of each optimizer step."),
            Curve("evaluation/loss", "Held-out loss", "nats a token", "Loss on rows that are not trained on."),
            Curve("accuracy", "Accuracy", "share", "Pairs whose chosen response got the higher reward."),
            Curve("evaluation/accuracy", "Held-out accuracy", "share", "The same on pairs that are not trained on."),
            Curve("margin", "Margin", "reward", "Reward of the chosen response less that of the rejected one."),
            Curve("mean_reward", "Mean reward", "reward", "Where the rewards lie; it should not drift far from 0."),
        ),
        prefixes=("reward/", "rewards/", "evaluation/"),
    ),
    CurveGroup(
        "How far the policy moved",
        (
            Curve("objective/kl", "KL from the reference", "nats a response", "Distance that the reward's penalty works on."),
            Curve("objective/kl_coef", "KL coefficient", "score a nat", "Weight of the KL penalty."),
            Curve("policy/entropy_avg", "Entropy", "nats a token", "Near 0 the policy has stopped to explore."),
            Curve("policy/approxkl_avg", "KL of an update", "nats a token", "How far one step's updates moved the policy."),
            Curve("policy/clipfrac_avg", "Clipped ratios", "share of tokens", "Tokens whose probability ratio was clipped."),
            Curve("val/ratio", "Mean ratio", "ratio", "New over old probability; far from 1, the update left its data."),
            Curve("policy/grad_norm", "Gradient norm", "norm", "Of the policy, before clipping."),
            Curve("grad_norm", "Gradient norm", "norm", "Before clipping."),
            Curve("loss/policy_avg", "Policy loss", "loss", "Mean over the step's updates."),
            Curve("lr", "Learning rate", "rate", "Of the policy."),
            Curve("learning_rate", "Learning rate", "rate", "Of each optimizer step."),
        ),
    ),
    CurveGroup(
        "Responses",
        (
            Curve("tokens/responses_len_mean", "Response length", "tokens", "Mean length of the sampled responses."),
            Curve("evaluation/response_length", "Held-out response length", "tokens", "Mean length of the held-out answers."),
            Curve("val/num_eos_tokens", "Finished responses", "responses", "Those that ended by themselves, not by the limit."),
            Curve("evaluation/distinct", "Distinct answers", "share", "Different ones among the held-out answers."),
        ),
    ),
    CurveGroup(
        "Value function",
        (
            Curve("ppo/val/var_explained", "Explained variance", "share", "1 is perfect; at 0 or below the critic is no help."),
            Curve("loss/value_avg", "Value loss", "loss", "Mean over the step's updates."),
            Curve("val/clipfrac_avg", "Clipped values", "share of tokens", "Tokens whose value change was clipped."),
            Curve("ppo/val/mean", "Mean value", "score", "What the critic expects."),
            Curve("ppo/returns/mean", "Mean return", "score", "What it should have expected."),
        ),
    ),
    CurveGroup(
        "Sampler and trainer",
        (
            Curve(
                "sampling/sampling_logp_difference/mean",
                "Log-prob gap, mean",
                "nats",
                "Between trainer's and sampler's log-probs of the same tokens: small proves that the weights arrived.",
            ),
            Curve("sampling/sampling_logp_difference/max", "Log-prob gap, largest", "nats", "The worst token of each step."),
            Curve(STALENESS, "Staleness", "versions", "Weight versions between sampling and training, of the shown rollouts."),
            Curve("sync/seconds", "Weight sync", "seconds", "From the trainer to all replicas."),
        ),
        prefixes=("staleness/",),
    ),
    CurveGroup(
        "Speed, cost and memory",
        (
            Curve(STEP_TIME, "Time of a step", "seconds", "From prompts to new weights in every replica."),
            Curve(SECONDS_PER_RESPONSE, "Cost of a response", "seconds", "Time of the step by the responses sampled in it."),
            Curve("speed/tokens_per_second", "Throughput", "tokens a second", "Tokens of the step by its whole time."),
            Curve("memory/peak_gib", "Peak memory so far", "GiB", "All processes of the run on the driver's machine."),
            Curve("policy/padding_share", "Padding", "share", "Part of the trained positions that hold no token."),
            Curve("padding_share", "Padding", "share", "Part of the trained positions that hold no token."),
        ),
        prefixes=tuple(f"memory/{role}_" for role in ("policy", "critic", "reference", "reward", "rollout")),
    ),
)
"""Groups of curves in the order of the page."""
DRAWN = frozenset(curve.metric for group in GROUPS for curve in group.curves)
MAX_PREFIXED = 12
"""Charts of metrics with a group's prefix at most; the table of all metrics has the rest."""


def curves_of(group: CurveGroup, names: list[str]) -> list[Curve]:
    """Return the curves of a group that a run with these metrics has."""
    found = [curve for curve in group.curves if curve.metric in names]
    more = [name for name in names if name.startswith(group.prefixes) and name not in DRAWN] if group.prefixes else []
    return found + [Curve(name, name, "", "") for name in more[:MAX_PREFIXED]]
