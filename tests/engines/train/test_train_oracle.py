"""The train engine replays TRL's recorded PPO steps: forwards, gradients, norms, and weights after two steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from rayrlhf.config.algorithm import ParitySection, ValueLossSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.policy_loss import PPOLossSection
from rayrlhf.config.train import OptimizerSection, TrainSection
from rayrlhf.data.records import TokenSequence
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.base import LossComponent, Objective
from rayrlhf.engines.objectives.policy import PolicyObjective, SharedObjective, ValueObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.spec import TrainEngineSpec
from tests.engines.training import weights_of, write_model
from tests.fixtures.oracle_cases import (
    CLASSIC_NAMES,
    MODERN_NAMES,
    ClassicCase,
    ClassicStep,
    MiniBatch,
    ModernCase,
    classic_case,
    modern_case,
)

START_TOLERANCE = 2e-6
"""Scores with the recorded start weights, and the first gradients.

Errors of log-probs and values are |ours - recorded| / max(1, |recorded|): one unit in the last place of a log-prob of -5 is
4.8e-7, and processors differ by up to four of them.
"""
MODERN_TOLERANCE = 1.2e-6
DRIFT = {
    "base_kl_adaptive": (4e-6, 5e-7),
    "adam_default": (5e-6, 1e-5),
    "mse_fixed_accum_gamma": (1e-5, 1e-6),
    "full_gpt2_scale_only": (4e-6, 5e-7),
    "early_stop": (1e-3, 5e-3),
}
"""(log-probs and values, weights) after up to eight optimizer steps. Changing the start weights by one unit in the last place
moves the results by as much, so no closer agreement can be asked of another order of operations; `early_stop` learns at rate 1.
In `adam_default` one weight of 4,160 has a gradient as small as Adam's epsilon and differs by 1e-7 to 5e-6 from processor to
processor; `BULK_TOLERANCE` holds the rest.
"""
BULK_TOLERANCE = 1e-6
"""99.9 % of the weights, where the learning rate is one that anybody would use."""

pytestmark = pytest.mark.usefixtures("alone")


@dataclass
class Recording:
    """An objective that keeps the network outputs of each micro-batch."""

    inner: Any
    recorded: list[dict[str, Tensor]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        self.recorded.append({name: tensor.detach().clone() for name, tensor in outputs.items()})
        return self.inner.compute(outputs, arrays)


def first_gradients_of(engine: TrainEngine) -> dict[str, Tensor]:
    """Filled with the gradients of the next optimizer step, by checkpoint name."""
    gradients: dict[str, Tensor] = {}
    inner = engine._backend._engine
    step = inner.step

    def recording_step() -> None:
        if not gradients:
            for name, parameter in inner.module.named_parameters():
                gradients[name.removeprefix("model.") if not name.startswith("v_head") else name] = parameter.grad.clone()
        step()

    inner.step = recording_step
    return gradients


def classic_engine(case: ClassicCase, folder: Path) -> TrainEngine:
    config = case.config
    train = TrainSection(
        micro_batch_size=config["mini_batch_size"],
        max_grad_norm=config["max_grad_norm"],
        optimizer=OptimizerSection(name=case.optimizer["class"].lower(), betas=(0.9, 0.999)),
        early_stop_kl=config["target_kl"] if config["early_stopping"] else None,
        ratio_guard=config["ratio_threshold"],
    )
    model = write_model(folder / case.name, case.model_config, case.policy_weights)
    return TrainEngine(
        TrainEngineSpec(
            ModelSection(path=str(model), dtype="float32"),
            frozenset({"lm", "value"}),
            train,
            case.optimizer["lr"],
            parity=ParitySection(mini_batch_means=True),
        )
    )


def classic_objective(case: ClassicCase) -> SharedObjective:
    config = case.config
    return SharedObjective(
        PolicyObjective(PPOLossSection(clip_low=config["cliprange"], clip_high=config["cliprange"])),
        ValueObjective(ValueLossSection(coefficient=config["vf_coef"], clip=config["cliprange_value"])),
    )


def classic_sequences(step: ClassicStep) -> list[TokenSequence]:
    return [
        TokenSequence(torch.cat([query[:p], response[:r]]).to(torch.int32).numpy(), int(p))
        for query, response, p, r in zip(step.queries, step.responses, step.query_lengths, step.response_lengths, strict=True)
    ]


def classic_batch(step: ClassicStep, sequences: Sequence[TokenSequence]) -> TrainingBatch:
    names = {"old_logprobs": "old_logprobs", "old_values": "values_masked", "advantages": "advantages", "returns": "returns"}
    arrays = {name: step.to_response(getattr(step, source)).numpy() for name, source in names.items()}
    mask = step.to_response(step.mask).bool().numpy()
    return TrainingBatch(sequences, {**arrays, "action_mask": mask, "value_mask": mask})


def plan_of(permutations: Sequence[Sequence[int]], size: int, epochs: int) -> UpdatePlan:
    """The recorded epochs, then the first again: those must not run, since TRL stopped before."""
    orders = [*permutations, *[permutations[0]] * (epochs - len(permutations))]
    return UpdatePlan([[order[start : start + size] for start in range(0, len(order), size)] for order in orders])


def flat_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], quantile: float = 1.0) -> float:
    missing = set(expected) - set(found)
    assert set(found) <= set(expected)
    assert missing <= {"lm_head.weight"}, "only a tied output layer has no weights of its own"
    return max(float((found[name] - expected[name]).abs().flatten().quantile(quantile)) for name in found)


def relative_error(found: ArrayLike, recorded: ArrayLike) -> float:
    """Largest |found - recorded| / max(1, |recorded|)."""
    ours, theirs = np.asarray(found, dtype=np.float64), np.asarray(recorded, dtype=np.float64)
    return float((np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs))).max())


def check_scores(engine: TrainEngine, step: ClassicStep, sequences: Sequence[TokenSequence], tolerance: float) -> None:
    scores = engine.score(sequences, frozenset({"logprobs", "values"}))
    for name, recorded in (("logprobs", step.old_logprobs), ("values", step.old_values_raw)):
        table = step.to_response(recorded)
        for row, (score, sequence) in enumerate(zip(scores, sequences, strict=True)):
            length = sequence.response_length
            assert relative_error(getattr(score, name)[:length], table[row, :length]) <= tolerance, f"{name} {row}"


def check_forwards(step: ClassicStep, outputs: Sequence[Mapping[str, Tensor]], tolerance: float) -> None:
    assert len(outputs) == len(step.mini_batches)
    for output, mini_batch in zip(outputs, step.mini_batches, strict=True):
        for name, recorded in (("logprobs", mini_batch.logprobs), ("values", mini_batch.values)):
            assert recorded is not None
            table = step.to_response(recorded, mini_batch.indices)
            width = min(table.shape[1], output[name].shape[1])
            inside = torch.arange(width) < step.response_lengths[mini_batch.indices, None]
            error = relative_error(output[name][:, :width][inside], table[:, :width][inside])
            assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("name", CLASSIC_NAMES)
def test_two_classic_steps_replay_forwards_gradients_norms_and_weights(name: str, tmp_path: Path) -> None:
    case = classic_case(name)
    forward_tolerance, weight_tolerance = DRIFT[name]
    engine = classic_engine(case, tmp_path)
    gradients = first_gradients_of(engine)
    size = case.config["mini_batch_size"] * case.config.get("gradient_accumulation_steps", 1)
    for step in case.steps:
        sequences = classic_sequences(step)
        check_scores(engine, step, sequences, START_TOLERANCE if step is case.steps[0] else forward_tolerance)
        recording = Recording(classic_objective(case))
        plan = plan_of(step.permutations, size, case.config["ppo_epochs"])
        report = engine.update(classic_batch(step, sequences), plan, recording)
        assert report.epochs == len(step.permutations)
        assert report.stopped_early == (len(step.permutations) < case.config["ppo_epochs"])
        check_forwards(step, recording.recorded, forward_tolerance)
        np.testing.assert_allclose(report.grad_norms, step.grad_norms, rtol=max(2e-6, forward_tolerance))
        if step.first_gradients:
            assert flat_error(gradients, step.first_gradients) <= START_TOLERANCE
    found = weights_of(engine) | {f"v_head.{key}": value for key, value in engine._network.v_head.state_dict().items()}
    assert flat_error(found, case.steps[-1].weights_after) <= weight_tolerance
    if name != "early_stop":
        assert flat_error(found, case.steps[-1].weights_after, quantile=0.999) <= BULK_TOLERANCE


def modern_engine(case: ModernCase, folder: Path, role: str) -> TrainEngine:
    config = case.config
    last_batch = case.name == "v2_last_batch"
    weights = case.policy_weights if role == "policy" else case.value_weights
    return TrainEngine(
        TrainEngineSpec(
            ModelSection(path=str(write_model(folder / role, case.model_config, weights)), dtype="float32"),
            frozenset({"lm"} if role == "policy" else {"value"}),
            TrainSection(
                micro_batch_size=config["per_device_train_batch_size"],
                optimizer=OptimizerSection(name="sgd"),
                max_grad_norm=None,
            ),
            config["learning_rate"],
            parity=ParitySection(mini_batch_means=True, no_accumulation=last_batch),
        )
    )


def modern_batch(case: ModernCase) -> TrainingBatch:
    width, slots = case.prompt_width, case.config["response_length"]
    sequences = []
    for query, row in zip(case.queries, case.query_responses, strict=True):
        prompt = query[query != case.pad_token_id]
        sequences.append(TokenSequence(torch.cat([prompt, row[width:]]).to(torch.int32).numpy(), len(prompt)))
    action_mask = case.advantages_mask
    last = action_mask.sum(1, keepdim=True) - 1
    value_mask = torch.arange(slots) <= last + 1
    values = torch.where(value_mask, case.full_value[:, width - 1 : width - 1 + slots], 0.0)
    arrays = {
        "old_logprobs": case.rollout_logprobs,
        "advantages": case.advantages_whitened,
        "old_values": values,
        "returns": case.advantages_before_whitening + values,
        "action_mask": action_mask,
        "value_mask": value_mask,
    }
    return TrainingBatch(sequences, {name: tensor.numpy() for name, tensor in arrays.items()})


def check_modern_forward(output: Mapping[str, Tensor], mini_batch: MiniBatch, mask: Tensor) -> None:
    inside = mask[mini_batch.indices]
    assert relative_error(output["logprobs"][inside], mini_batch.logprobs[inside]) <= MODERN_TOLERANCE


@pytest.mark.parametrize("name", MODERN_NAMES)
def test_a_modern_update_replays_in_two_engines_as_in_trls_single_optimizer(name: str, tmp_path: Path) -> None:
    case = modern_case(name)
    config = case.config
    batch = modern_batch(case)
    permutations = [
        torch.cat([part.indices for part in case.micro_batches[start : start + 2]]).tolist()
        for start in range(0, len(case.micro_batches), 2)
    ]
    plan = plan_of(permutations, len(batch), len(permutations))
    temperature = config["temperature"] + 1e-7
    objectives: dict[str, Objective] = {
        "policy": PolicyObjective(temperature=temperature),
        "value": ValueObjective(ValueLossSection(coefficient=config["vf_coef"], clip=config["cliprange_value"])),
    }
    norms: dict[str, list[float]] = {}
    for role, objective in objectives.items():
        engine = modern_engine(case, tmp_path, role)
        if role == "policy":
            for score, recorded, mask in zip(
                engine.score(batch.sequences, frozenset({"logprobs"}), temperature=temperature),
                case.rollout_logprobs,
                case.advantages_mask,
                strict=True,
            ):
                assert relative_error(score.logprobs[mask], recorded[mask]) <= MODERN_TOLERANCE
        recording = Recording(objective)
        norms[role] = engine.update(batch, plan, recording).grad_norms
        if role == "policy":
            for output, mini_batch in zip(recording.recorded, case.micro_batches, strict=True):
                check_modern_forward(output, mini_batch, case.advantages_mask)
        after = case.policy_weights_after if role == "policy" else case.value_weights_after
        found = weights_of(engine)
        if role == "value":
            found = {f"transformer.{key}": value for key, value in found.items()}
            found["score.weight"] = engine._network.v_head.summary.weight.detach()
        assert flat_error(found, after) <= MODERN_TOLERANCE
    both = np.hypot(norms["policy"], norms["value"])
    np.testing.assert_allclose(both, case.grad_norms, rtol=2e-6)
