"""Metrics drawn on a report page, in order, with titles, units and explanations."""

from dataclasses import dataclass

from rayrlhf.observe.metric_names import ROUTER_LOSS, ROUTING_DIFFERENCE, SHARED_FRACTION

STEP_TIME, EPISODES, SYNC_VERSION = "time/step", "episode", "sync/version"
SECONDS_PER_RESPONSE = "derived/seconds_per_response"
STALENESS = "derived/staleness"


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric to draw: name, chart title, axis unit, and explanation."""

    metric: str
    title: str
    unit: str
    words: str


@dataclass(frozen=True, slots=True)
class CurveGroup:
    """Curves under one heading; further metrics with one of the `prefixes` are also drawn."""

    heading: str
    curves: tuple[Curve, ...]
    prefixes: tuple[str, ...] = ()


GROUPS = (
    CurveGroup(
        "Reward and quality",
        (
            Curve("objective/scores", "Score", "score", "Mean score of the sampled responses, before the KL penalty."),
            Curve("evaluation/score", "Held-out score", "score", "Mean score of responses to held-out prompts."),
            Curve("objective/rlhf_reward", "Score minus KL penalty", "score", "The reward that the policy is trained on."),
            Curve("ppo/std_scores", "Standard deviation of scores", "score", "Near 0 there is no training signal."),
            Curve("loss", "Training loss", "nats per token", "Loss of each optimizer step."),
            Curve("evaluation/loss", "Held-out loss", "nats per token", "Loss on rows that are not trained on."),
            Curve("accuracy", "Accuracy", "share", "Pairs whose chosen response got the higher reward."),
            Curve("evaluation/accuracy", "Held-out accuracy", "share", "The same on pairs that are not trained on."),
            Curve("margin", "Margin", "reward", "Reward of the chosen response minus that of the rejected one."),
            Curve("mean_reward", "Mean reward", "reward", "Mean of all rewards; it should not drift far from 0."),
        ),
        prefixes=("reward/", "rewards/", "evaluation/"),
    ),
    CurveGroup(
        "How far the policy moved",
        (
            Curve("objective/kl", "KL from the reference", "nats per response", "Distance that the KL penalty is based on."),
            Curve("objective/teacher_kl", "KL to the teacher", "nats per response", "Reverse KL that distillation lowers."),
            Curve("objective/kl_coef", "KL coefficient", "score per nat", "Weight of the KL penalty."),
            Curve("policy/entropy_avg", "Entropy", "nats per token", "Near 0 the policy has stopped exploring."),
            Curve("policy/approxkl_avg", "KL of an update", "nats per token", "How far one step's updates moved the policy."),
            Curve("policy/clipfrac_avg", "Clipped ratios", "share of tokens", "Tokens whose probability ratio was clipped."),
            Curve("val/ratio", "Mean ratio", "ratio", "New over old probability; far from 1, the update is off-policy."),
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
            Curve("evaluation/response_length", "Held-out response length", "tokens", "Mean length of held-out responses."),
            Curve("val/num_eos_tokens", "Finished responses", "responses", "Responses that ended with a stop token."),
            Curve("evaluation/distinct", "Distinct answers", "share", "Distinct ones among the held-out answers."),
        ),
    ),
    CurveGroup(
        "Value function",
        (
            Curve("ppo/val/var_explained", "Explained variance", "share", "1 is perfect; at 0 or below the critic is useless."),
            Curve("loss/value_avg", "Value loss", "loss", "Mean over the step's updates."),
            Curve("val/clipfrac_avg", "Clipped values", "share of tokens", "Tokens whose value change was clipped."),
            Curve("ppo/val/mean", "Mean value", "score", "Mean prediction of the critic."),
            Curve("ppo/returns/mean", "Mean return", "score", "Mean target of the critic."),
        ),
    ),
    CurveGroup(
        "Rollout engine and trainer",
        (
            Curve(
                "sampling/sampling_logp_difference/mean",
                "Log-prob gap, mean",
                "nats",
                "Between log-probs of trainer and rollout engine for the same tokens; small after a correct weight sync.",
            ),
            Curve("sampling/sampling_logp_difference/max", "Log-prob gap, largest", "nats", "The worst token of each step."),
            Curve(STALENESS, "Staleness", "versions", "Weight versions between sampling and training, of the shown rollouts."),
            Curve("sync/seconds", "Weight sync", "seconds", "From the trainer to all replicas."),
        ),
        prefixes=("staleness/",),
    ),
    CurveGroup(
        "Experts",
        (
            Curve(
                ROUTER_LOSS, "Load-balancing loss", "loss", "Before its coefficient; k with k experts per token is balanced."
            ),
            Curve(ROUTING_DIFFERENCE, "Other experts", "share of tokens", "Tokens whose own experts differ from the replayed."),
        ),
        prefixes=("moe/",),
    ),
    CurveGroup(
        "Speed, cost and memory",
        (
            Curve(STEP_TIME, "Time of a step", "seconds", "From prompts to new weights in every replica."),
            Curve(SECONDS_PER_RESPONSE, "Seconds per response", "seconds", "Step time divided by its sampled responses."),
            Curve("speed/tokens_per_second", "Throughput", "tokens per second", "Tokens of the step divided by its time."),
            Curve("memory/peak_gib", "Peak memory so far", "GiB", "All processes of the run on the driver's machine."),
            Curve("policy/padding_share", "Padding", "share", "Share of trained positions without a token."),
            Curve(
                SHARED_FRACTION,
                "Shared prefixes",
                "share",
                "Share of trained tokens that were computed for another sample.",
            ),
            Curve("padding_share", "Padding", "share", "Share of trained positions without a token."),
        ),
        prefixes=tuple(
            f"memory/{role}_" for role in ("policy", "critic", "reference", "teacher", "reward", "judge", "rollout")
        ),
    ),
)
"""Groups of curves in the order of the page."""
DRAWN = frozenset(curve.metric for group in GROUPS for curve in group.curves)
MAX_PREFIXED = 12
"""Maximum charts of metrics with a group's prefix; the table of all metrics has the rest."""


def curves_of(group: CurveGroup, names: list[str]) -> list[Curve]:
    """Return the curves of a group for the given metrics."""
    found = [curve for curve in group.curves if curve.metric in names]
    more = [name for name in names if name.startswith(group.prefixes) and name not in DRAWN] if group.prefixes else []
    return found + [Curve(name, name, "", "") for name in more[:MAX_PREFIXED]]
