"""One rank of a model that learns: scores with it, takes optimizer steps on it, hands its weights out, saves and restores it.

The gradient of an optimizer step is a property of its samples alone. Each loss is divided by its token count over the whole
mini-batch, so micro-batch size, padding and number of ranks change nothing but rounding. Forward passes run without dropout, so
that a ratio of new to old log-probs measures the policy's movement and not a coin.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch

from rayrlhf.data.records import TokenScores, TokenSequence
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.base import Objective
from rayrlhf.engines.scoring.frozen import score_sequences, training_device
from rayrlhf.engines.train.backends import deepspeed_state as train_state
from rayrlhf.engines.train.backends.deepspeed import whole, wrap
from rayrlhf.engines.train.backends.deepspeed_resize import load_resized
from rayrlhf.engines.train.ema import MovingAverage
from rayrlhf.engines.train.optimizers import build_optimizer
from rayrlhf.engines.train.plan import UpdatePlan, UpdateReport
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.engines.train.update import Updater
from rayrlhf.models.adapter_folder import adapter_parameters, save_adapters
from rayrlhf.models.load import load_tokenizer, resolve_dtype
from rayrlhf.models.lora import adapters_disabled, checkpoint_tensors, has_lora
from rayrlhf.models.network import Network, OutputName, build_network
from rayrlhf.models.reward_folder import is_reward_model, save_reward_model
from rayrlhf.weight_sync.buckets import WeightBucket, bucketed

__all__ = ["TrainEngine", "TrainEngineSpec", "UpdatePlan", "UpdateReport"]


class TrainEngine:
    """A `ScoreEngine` and `WeightSource` that learns. Every rank of the role makes the same calls in the same order."""

    def __init__(self, spec: TrainEngineSpec) -> None:
        """Load the model on this process's device and wrap it; the process has joined its process group.

        Raises:
            UserError: the model cannot be loaded.
        """
        self._spec = spec
        self._device = training_device()
        network = build_network(spec.model, spec.heads, spec.head_init, spec.seed, head_bias=spec.head_bias)
        network.noise_alpha = spec.noise_alpha
        if spec.packing or spec.targets_only:
            network.accept_packed_rows()
        self._network = network.to(self._device)
        optimizer = build_optimizer(self._network.parameters(), spec.train.optimizer, spec.learning_rate)
        _remember_frozen_layers(self._network, spec)
        self._engine = wrap(self._network, optimizer, spec.train, resolve_dtype(spec.model.dtype))
        # Recomputing activations needs training mode; there is no dropout in a network that the mode could switch on.
        self._network.train(spec.model.gradient_checkpointing)
        decay = spec.train.ema_decay if "lm" in spec.heads and torch.distributed.get_rank() == 0 else None
        self._average = MovingAverage(self._network, decay) if decay is not None else None
        self._updater = Updater(self._engine, spec, self._device, self._average)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps taken since the run began."""
        return self._updater.optimizer_steps

    def score(
        self,
        sequences: Sequence[TokenSequence],
        outputs: frozenset[OutputName],
        *,
        temperature: float = 1.0,
        reference: bool = False,
    ) -> list[TokenScores]:
        """Score sequences in the order given; `reference` switches adapters off.

        Under ZeRO-3 every rank must make the same number of forwards, so all ranks pass the same sequences.

        Raises:
            ValueError: the network has no head for something in `want`, or no adapters to switch off.
        """
        if reference and not has_lora(self._network):
            raise ValueError("a network without adapters has no reference inside it")
        with adapters_disabled(self._network) if reference else nullcontext():
            return score_sequences(
                self._engine,
                sequences,
                outputs,
                temperature=temperature,
                token_budget=self._spec.train.score_batch_tokens,
                device=self._device,
            )

    def update(self, batch: TrainingBatch, plan: UpdatePlan, objective: Objective) -> UpdateReport:
        """Take the plan's optimizer steps; every rank passes the same batch, plan and objective and does its own share.

        Raises:
            KeyError: the batch lacks an array the objective reads.
            ValueError: an optimizer step has no token under one of the objective's masks.
        """
        report = self._updater.run(batch, plan, objective)
        if self._network.prefix is not None:
            self._network.prefix.clear()  # the next step brings sequences of its own
        return report

    def weight_buckets(
        self, bucket_bytes: int = 256 * 2**20, *, dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> Iterator[WeightBucket]:
        """Yield the weights under Hugging Face names: adapters folded in, tied tensors once, value head left out.

        Every rank must exhaust the iterator. Tensors are contiguous, on the CPU, and on loan until the next update: where
        nothing had to be computed they are the parameters' own memory.

        Args:
            bucket_bytes: about the size of a bucket.
            dtype: what the sampler holds its weights in; a bfloat16 sampler gets them rounded once, here.
        """
        return bucketed(self._checkpoint(getattr(torch, dtype)), bucket_bytes)

    def device_weights(self, dtype: Literal["float32", "bfloat16"]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the same weights one by one where they are computed, each valid until the next; every rank must exhaust it."""
        return self._checkpoint(getattr(torch, dtype), self._device)

    def save_state(self, folder: Path) -> None:
        """Write this rank's part of weights, optimizer, counters and random state into an existing or new folder.

        The caller makes the folder appear whole (`rayrlhf.storage.atomic.folder_atomically`), because all ranks write into it.
        """
        train_state.save(self._engine, self._updater, folder)

    def capture_state(self) -> train_state.StateFiles:
        """Copy what `save_state` would write into memory; every rank takes part. No later update changes the copy."""
        return train_state.capture(self._engine, self._updater)

    def load_captured(self, parts: Sequence[train_state.StateFiles]) -> None:
        """Continue from what all ranks captured, as `load_state` does from their files."""
        train_state.load_captured(self._engine, self._updater, parts)

    def load_state(self, folder: Path, *, resized: bool = False) -> None:
        """Continue from a saved state: on the same number of ranks the next update is the same bit for bit.

        Args:
            folder: where every rank's part lies.
            resized: the state is of another number of ranks; the next update is then the same but for rounding.

        Raises:
            UserError: the folder holds no complete state for this rank.
        """
        if resized:
            load_resized(self._engine, self._updater, folder)
        else:
            train_state.load(self._engine, self._updater, folder)

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder with merged weights and the tokenizer, and the value head beside them where there is one.

        A network with nothing but a head without bias is a reward model, and becomes a sequence classifier of one label. Where
        a moving average of the weights is kept, it goes to a second folder, with `-average` behind the name.

        Every rank takes part; rank 0 writes. The folder appears whole, and an older one is replaced.

        Raises:
            UserError: the model has no tokenizer.
        """
        self._export(folder)
        if self._spec.train.ema_decay is not None and "lm" in self._spec.heads:
            with self._average.in_place() if self._average is not None else nullcontext():
                self._export(folder.with_name(f"{folder.name}-average"))

    def _export(self, folder: Path) -> None:
        state = {name: tensor.clone() for name, tensor in self._checkpoint(torch.float32)}
        if torch.distributed.get_rank() == 0:
            tokenizer = load_tokenizer(self._spec.model)
            if is_reward_model(self._network):
                save_reward_model(self._network, state, tokenizer, folder)
            else:
                train_state.export(self._network, state, tokenizer, folder)
        torch.distributed.barrier()

    def export_adapters(self, folder: Path) -> None:
        """Write the adapters alone as a PEFT folder beside the tokenizer, as `export` does the whole.

        Raises:
            ValueError: the network has none.
            UserError: the model has no tokenizer.
        """
        if self._spec.model.lora is None:
            raise ValueError("a network without adapters has none to export")
        state = {}
        for name, parameter in adapter_parameters(self._network.model):
            with whole((parameter,)):
                state[name] = parameter.detach().cpu().clone()
        if torch.distributed.get_rank() == 0:
            save_adapters(self._network.model, self._spec.model, state, load_tokenizer(self._spec.model), folder)
        torch.distributed.barrier()

    def keep_teacher_layer(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keep the present output layer beside the network as the teacher's, and return it; every rank takes part."""
        weight, bias = self.output_layer()
        self._network.teacher_layer = weight.to(self._device), None if bias is None else bias.to(self._device)
        return self._network.teacher_layer

    @property
    def teacher_layer(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """What `keep_teacher_layer` kept, None before."""
        return self._network.teacher_layer

    def output_layer(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [V, H] and bias [V] (or None) of the output layer, on the CPU, for a full KL from hidden states."""
        head = self._network.model.get_output_embeddings()
        with whole(tuple(head.parameters())):
            return head.weight.detach().cpu().clone(), None if head.bias is None else head.bias.detach().cpu().clone()

    def _checkpoint(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        for tensor in checkpoint_tensors(self._network.model):
            with whole(tensor.parameters):
                value = tensor.value()
                value = value.to(device, value.dtype if tensor.is_buffer else dtype).contiguous()
                if any(hasattr(parameter, "ds_id") for parameter in tensor.parameters):
                    value = value.clone()  # the gathered memory goes away with the block
            yield tensor.name, value


def _remember_frozen_layers(network: Network, spec: TrainEngineSpec) -> None:
    """Skip what adapters on the last layers leave alone. Not under ZeRO-3, which learns one fixed order of layers."""
    lora = spec.model.lora
    if (
        lora is not None
        and lora.last_layers is not None
        and spec.train.zero_stage < 3
        and not (spec.packing or spec.targets_only or spec.noise_alpha)
        and not spec.model.gradient_checkpointing
    ):
        network.remember_frozen_layers(network.model.config.num_hidden_layers - lora.last_layers)
