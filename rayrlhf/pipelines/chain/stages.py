"""Stage kinds of a chain: configuration, run function, and outputs for later stages.

A new kind is one function and one line in `STAGES`. Drivers are imported lazily, because a check needs none of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.config.icl import ICLBuildConfig, ICLDistillConfig, ICLEvaluateConfig, ICLPackConfig
from rayrlhf.config.pipelines import EvaluateConfig, StageKind
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.section import Section
from rayrlhf.config.tuning import DPOConfig, RewardTrainingConfig, SFTConfig


@dataclass(frozen=True, slots=True)
class StageType:
    """A kind of stage.

    Attributes:
        config: root section of its configuration.
        run: runs or resumes it, and returns its result in one line.
        export: folder of the exported model, relative to the stage's folder; "" for none.
        dataset: file with training data, relative to the stage's folder; "" for none.
        leaves_dataset: returns True for a configuration that writes that file.
    """

    config: type[Section]
    run: Callable[[Any], str]
    export: str = "export"
    dataset: str = ""
    leaves_dataset: Callable[[Any], bool] = lambda _: True

    def outputs(self, folder: Path, config: Section) -> Mapping[str, str]:
        """Return the outputs for later stages, known before the stage runs."""
        outputs = {"folder": str(folder)}
        if self.export:
            outputs["export"] = str(folder / self.export)
        if self.dataset and self.leaves_dataset(config):
            outputs["dataset"] = str(folder / self.dataset)
        return outputs


def _sft(config: SFTConfig) -> str:
    from rayrlhf.tuning.train_model import train_sft

    return _numbers(train_sft(config).metrics)


def _reward(config: RewardTrainingConfig) -> str:
    from rayrlhf.tuning.train_model import train_reward

    return _numbers(train_reward(config).metrics)


def _dpo(config: DPOConfig) -> str:
    from rayrlhf.tuning.train_model import train_dpo

    return _numbers(train_dpo(config).metrics)


def _ppo(config: PPOConfig) -> str:
    from rayrlhf.observe.metrics import read_metrics
    from rayrlhf.ppo.train_ppo import train_ppo

    result = train_ppo(config)
    scores = [row["evaluation/score"] for row in read_metrics(result.folder) if "evaluation/score" in row]
    change = f", held-out score {scores[0]:.3f} -> {scores[-1]:.3f}" if scores else ""
    return f"{result.steps} steps{change}"


def _evaluate(config: EvaluateConfig) -> str:
    from rayrlhf.pipelines.evaluation.evaluate_model import evaluate_model

    result = evaluate_model(config)
    parts = result.parts or {"score": result.score}
    return ", ".join(f"{name} {interval}" for name, interval in parts.items()) + f" over {result.prompts} prompts"


def _icl_build(config: ICLBuildConfig) -> str:
    from rayrlhf.pipelines.icl.build_dataset import build_dataset

    return build_dataset(config).lines()[0]


def _icl_pack(config: ICLPackConfig) -> str:
    from rayrlhf.pipelines.icl.pack_documents import pack_documents

    return pack_documents(config).lines()[0]


def _icl_distill(config: ICLDistillConfig) -> str:
    from rayrlhf.pipelines.icl.distill import distill_context

    return _numbers(distill_context(config).metrics)


def _icl_evaluate(config: ICLEvaluateConfig) -> str:
    from rayrlhf.pipelines.icl.evaluate_icl import evaluate_curve

    return "; ".join(evaluate_curve(config).lines()[:-1])


STAGES: Mapping[StageKind, StageType] = {
    "sft": StageType(SFTConfig, _sft),
    "reward": StageType(RewardTrainingConfig, _reward),
    "dpo": StageType(DPOConfig, _dpo),
    "ppo": StageType(PPOConfig, _ppo),
    "evaluate": StageType(
        EvaluateConfig, _evaluate, export="", dataset="kept.jsonl", leaves_dataset=lambda config: config.keep is not None
    ),
    "icl-build": StageType(ICLBuildConfig, _icl_build, export="", dataset="dataset.parquet"),
    "icl-pack": StageType(ICLPackConfig, _icl_pack, export="", dataset="dataset.parquet"),
    "icl-distill": StageType(ICLDistillConfig, _icl_distill, export="student/export", dataset="dataset.parquet"),
    "icl-evaluate": StageType(ICLEvaluateConfig, _icl_evaluate, export=""),
}


def _numbers(metrics: Mapping[str, float]) -> str:
    """Return the held-out metrics of a tuning run in one line."""
    return ", ".join(f"{name.rpartition('/')[2]} {value:.3f}" for name, value in metrics.items())
