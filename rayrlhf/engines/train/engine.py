"""Train engine: one rank of a trained model.

The gradient of an optimizer step depends on its samples only. Each loss is divided by its token count over the whole
mini-batch, so micro-batch size, padding and number of ranks change rounding at most. Forward passes run without dropout: the
ratio of new to old log-probs measures the policy update and is deterministic.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from rayrlhf.data.records import TokenScores, TokenSequence
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.base import Objective
from rayrlhf.engines.scoring.frozen import score_sequences, training_device
from rayrlhf.engines.train import training_state
from rayrlhf.engines.train.backends.base import StateFiles, TrainBackend
from rayrlhf.engines.train.backends.deepspeed import DeepSpeedBackend
from rayrlhf.engines.train.ema import MovingAverage
from rayrlhf.engines.train.optimizers import build_optimizer
from rayrlhf.engines.train.plan import UpdatePlan, UpdateReport
from rayrlhf.engines.train.process_group import Grid, make_grid
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.engines.train.update import Updater
from rayrlhf.errors import UserError
from rayrlhf.models.adapter_folder import adapter_parameters, save_adapters
from rayrlhf.models.export import save_network
from rayrlhf.models.load import checkpoint_dtype, load_tokenizer, resolve_dtype
from rayrlhf.models.load_check import split_weights
from rayrlhf.models.lora import CheckpointTensor, adapters_disabled, checkpoint_tensors, has_lora
from rayrlhf.models.network import build_network
from rayrlhf.models.network_io import OutputName
from rayrlhf.models.rounding import UpdateShare, write_share
from rayrlhf.models.router_load import has_load
from rayrlhf.models.tensor_files import TensorKind, TensorStream
from rayrlhf.weight_sync.buckets import SyncDtype, WeightBucket, bucketed

TRAIN_BACKENDS: dict[str, type[TrainBackend]] = {"deepspeed": DeepSpeedBackend}
"""Backends by `TrainEngineSpec.backend`."""


class TrainEngine:
    """Scoring, updates and export of a trained model on one rank.

    Every rank of the role makes the same calls in the same order.

    Attributes:
        grid: this rank's place among the ranks.
    """

    def __init__(self, spec: TrainEngineSpec) -> None:
        """Load the model on this process's device and wrap it in its backend.

        The process must have joined its process group.

        Raises:
            UserError: the model cannot be loaded.
        """
        self._spec = spec
        self._device = training_device()
        backend, dtype = TRAIN_BACKENDS[spec.backend], resolve_dtype(spec.model.dtype)
        shards = backend.weight_shards(spec.train, dtype, self._device)
        network = build_network(spec.model, spec.heads, spec.head_init, spec.seed, head_bias=spec.head_bias, shards=shards)
        packing, lora = spec.packing or spec.targets_only, spec.model.lora
        with nullcontext() if shards is None else shards.in_use(network.model):
            if spec.noise_alpha is not None:
                network.add_noise(spec.noise_alpha)
            network.accept_packed_rows(packing=packing, unshared=spec.unshared)
            if network.check.layout != "packed":
                self._spec = spec = replace(spec, packing=False)
            self.grid: Grid = make_grid(spec.sequence_parallel, spec.tensor_parallel, spec.expert_parallel)
            if self.grid.weight_split is not None:
                split_weights(network, self.grid.weight_split, spec.model.path, self._device, shards)
            if spec.routing_replay:
                network.replay_routing(spec.model.path)
            self._network = network.to(self._device)
            if self.grid.row_split is not None:
                network.split_rows(self.grid.row_split, spec.model.path)
        head = () if self._network.v_head is None else self._network.v_head.parameters()
        optimizer = build_optimizer(
            self._network.parameters(), spec.train.optimizer, spec.learning_rate, head, spec.head_learning_rate
        )
        self._backend = backend.wrap(self._network, optimizer, spec.train, dtype)
        check = network.check
        if self._backend.all_ranks_must_forward and (check.layout == "alone" or check.longest_together is not None):
            shared = f"expert_parallel {spec.expert_parallel}" if spec.expert_parallel > 1 else spec.train.sharding_label
            raise UserError(
                f"train: {shared}: a {check.family} model computes samples one by one, and ranks that make "
                "different numbers of forward passes would wait for each other; expected whole parameters on each rank"
            )
        # ZeRO-3 prefetches layers in one fixed order, and ranks that share experts meet in each.
        cached = spec.caches_frozen_layers and not self._backend.all_ranks_must_forward and self.grid.row_split is None
        if cached and lora is not None and lora.last_layers is not None:
            network.remember_frozen_layers(network.model.config.num_hidden_layers - lora.last_layers)
        # Recomputing activations needs training mode, which switches no dropout on: the network has none.
        self._network.train(spec.model.gradient_checkpointing)
        decay = spec.train.ema_decay if "lm" in spec.heads and torch.distributed.get_rank() == 0 else None
        self._average = MovingAverage(self._network, decay) if decay is not None else None
        self._arrived: float | None = None
        self._updater = Updater(
            self._backend,
            spec,
            self._device,
            self.grid,
            self._average,
            shares_prefixes=self.shares_prefixes,
            measures_load=spec.router_load and has_load(network.model.config),
        )

    @property
    def load_check(self) -> str:
        """Outcome of the check on load, in words."""
        return self._network.check.line()

    @property
    def shares_prefixes(self) -> bool:
        """True if common prefixes of samples are computed once, where that saves time."""
        return self._network.check.shares_prefixes

    @property
    def sync_dtype(self) -> SyncDtype:
        """Dtype of weights for rollout engines: bfloat16 where this device computes in it, else float32."""
        return "bfloat16" if resolve_dtype(self._spec.model.dtype) == torch.bfloat16 else "float32"

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps taken since the run began."""
        return self._updater.optimizer_steps

    @property
    def all_ranks_must_forward(self) -> bool:
        """True if every rank must run the same forward passes.

        All ranks must then score the same sequences.
        """
        return self._backend.all_ranks_must_forward

    @property
    def shards_parameters(self) -> bool:
        """True if no rank holds whole parameters."""
        return self._backend.shards_parameters

    def score(
        self,
        sequences: Sequence[TokenSequence],
        outputs: frozenset[OutputName],
        *,
        temperature: float = 1.0,
        reference: bool = False,
    ) -> list[TokenScores]:
        """Score sequences, in input order; `reference` disables the adapters.

        All ranks pass the same sequences if `all_ranks_must_forward`, and ranks that share rows or weights do always.

        Raises:
            ValueError: the network has no head for one of `outputs`, or no adapters to disable.
        """
        if reference and not has_lora(self._network):
            raise ValueError("a network without adapters contains no reference model")
        if reference:
            sequences = [replace(sequence, experts=None) for sequence in sequences]  # they are the policy's
        with adapters_disabled(self._network) if reference else nullcontext():
            return score_sequences(
                self._backend.forward,
                sequences,
                outputs,
                temperature=temperature,
                token_budget=self._spec.train.score_batch_tokens,
                device=self._device,
                shares_prefixes=self.shares_prefixes,
            )

    def update(self, batch: TrainingBatch, plan: UpdatePlan, objective: Objective) -> UpdateReport:
        """Take the plan's optimizer steps.

        Every rank passes the same batch, plan and objective, and computes its share, or its columns of one.

        Raises:
            KeyError: the batch lacks an array of the objective.
            ValueError: an optimizer step has no token under one of the objective's masks.
        """
        report = self._updater.run(batch, plan, objective)
        if self._network.prefix is not None:
            self._network.prefix.clear()  # the next step has other sequences
        return report

    def weight_buckets(
        self, bucket_bytes: int = 256 * 2**20, *, dtype: SyncDtype = "float32", adapters: bool = False
    ) -> Iterator[WeightBucket]:
        """Yield the weights under Hugging Face names: adapters merged, tied tensors once, without value head.

        Every rank must exhaust the iterator. Tensors are contiguous, on the CPU, and valid until the next update: those that
        needed no computation share memory with the parameters.

        Args:
            bucket_bytes: approximate size of a bucket.
            dtype: dtype of the rollout engine's weights; rounding to bfloat16 happens once, here.
            adapters: yield the adapters' tensors alone, under the names of PEFT's files.
        """
        tensors = self._adapters(getattr(torch, dtype)) if adapters else self._checkpoint(getattr(torch, dtype))
        return bucketed(tensors, bucket_bytes)

    def join_weights(self, dtype: SyncDtype, *, adapters: bool = False) -> None:
        """Take part in gathering the weights for `weight_buckets` of another rank.

        Nothing leaves the device.
        """
        own = getattr(torch, dtype)
        for _ in self._adapters(own) if adapters else self._checkpoint(own, self._device):
            pass

    @property
    def update_arrived(self) -> float | None:
        """Share of the update that survived the last rounding of merged weights.

        None without an update, or in float32. It is 1 without adapters: the network multiplies by its weights in the dtype in
        which they travel, so the rounded weights are the intended ones.
        """
        return self._arrived

    def device_weights(self, dtype: SyncDtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the same weights one by one on the training device.

        Each is valid until the next; every rank must exhaust the iterator.
        """
        return self._checkpoint(getattr(torch, dtype), self._device)

    def checksums(self) -> dict[str, int]:
        """Return a 48-bit checksum of each parameter; every rank takes part.

        With adapters, of the merged weights and of the adapters.
        """
        head = self._network.v_head
        sums = {name: _checksum(tensor) for bucket in self.weight_buckets() for name, tensor in bucket}
        if self._spec.model.lora is not None:
            sums |= {name: _checksum(tensor) for name, tensor in self._adapters(torch.float32)}
        if head is not None:
            with self._backend.gathered(tuple(head.parameters())):
                sums |= {f"v_head.{name}": _checksum(value.detach().cpu()) for name, value in head.named_parameters()}
        return sums

    def save_state(self, folder: Path) -> None:
        """Write this rank's part of weights, optimizer, counters and random state.

        The folder may exist. All ranks write into it, so the caller makes it atomic
        (`rayrlhf.storage.atomic.folder_atomically`).
        """
        training_state.save(self._backend, self._updater, folder)

    def capture_state(self) -> StateFiles:
        """Copy the files of `save_state` into memory; every rank takes part.

        Later updates do not change the copy.
        """
        return training_state.capture(self._backend, self._updater)

    def load_captured(self, parts: Sequence[StateFiles]) -> None:
        """Restore the captured parts of all ranks, as `load_state` does from files."""
        training_state.load_captured(self._backend, self._updater, parts)

    def load_state(self, folder: Path, *, resized: bool = False) -> None:
        """Restore a saved state.

        On the same number of ranks the next update is identical bit for bit.

        Args:
            folder: parts of all ranks.
            resized: the state is of another number of ranks; the next update is then identical up to rounding.

        Raises:
            UserError: the folder holds no complete state for this rank.
        """
        load = training_state.load_resized if resized else training_state.load
        load(self._backend, self._updater, folder)

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder with merged weights, tokenizer and value head.

        Weights have the dtype of the base.

        A network with only a bias-free scalar head is a reward model and becomes a sequence classifier with one label. The
        moving average of the weights, if one is kept, goes to a second folder whose name ends in `-average`. A language model's
        adapters are also written by themselves, to one that ends in `-adapters`: merged ones lose a part to rounding.

        Every rank takes part; rank 0 writes. The folder is written atomically and replaces an older one.

        Raises:
            UserError: the model has no tokenizer.
        """
        self._export(folder)
        if self._spec.model.lora is not None and "lm" in self._spec.heads:
            self.export_adapters(folder.with_name(f"{folder.name}-adapters"))
        if self._spec.train.ema_decay is not None and "lm" in self._spec.heads:
            with self._average.in_place() if self._average is not None else nullcontext():
                self._export(folder.with_name(f"{folder.name}-average"))

    def _export(self, folder: Path) -> None:
        dtype, head = checkpoint_dtype(self._spec.model), self._network.v_head
        with self._backend.gathered(() if head is None else tuple(head.parameters())):
            if torch.distributed.get_rank() == 0:
                tokenizer = load_tokenizer(self._spec.model)
                kinds = {
                    tensor.name: TensorKind(tensor.shape, tensor.value().dtype if tensor.is_buffer else dtype)
                    for tensor in checkpoint_tensors(self._network.model)
                }
                save_network(self._network, TensorStream(kinds, self._checkpoint(dtype)), tokenizer, folder, dtype)
                if self._spec.model.lora is not None:
                    write_share(folder, self._arrived, dtype)
            else:
                for _ in self._checkpoint(dtype, self._device):
                    pass
        torch.distributed.barrier()

    def export_adapters(self, folder: Path) -> None:
        """Write only the adapters and the tokenizer as a PEFT folder; every rank takes part.

        Raises:
            ValueError: the network has none.
            UserError: the model has no tokenizer.
        """
        if self._spec.model.lora is None:
            raise ValueError("the network has no adapters to export")
        state = dict(self._adapters(torch.float32))
        if torch.distributed.get_rank() == 0:
            save_adapters(self._network.model, self._spec.model, state, load_tokenizer(self._spec.model), folder)
        torch.distributed.barrier()

    def keep_teacher_layer(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Store and return the current output layer as the teacher's; every rank takes part."""
        weight, bias = self.output_layer()
        self._network.teacher_layer = weight.to(self._device), None if bias is None else bias.to(self._device)
        return self._network.teacher_layer

    @property
    def teacher_layer(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Output layer stored by `keep_teacher_layer`, None before."""
        return self._network.teacher_layer

    def output_layer(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight [V, H] and bias [V] (or None) of the output layer.

        The copies are on the CPU. Every rank takes part.
        """
        head = self._network.model.get_output_embeddings()
        with self._backend.gathered(tuple(head.parameters())):
            weight, *bias = [self._whole(one, one.detach()).cpu().clone() for one in head.parameters()]
            return weight, bias[0] if bias else None

    def _adapters(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        parameters = dict(adapter_parameters(self._network.model))
        with self._backend.gathered(tuple(parameters.values())):
            copies = {
                name: self._whole(parameter, parameter.detach()).to("cpu", dtype, copy=True)
                for name, parameter in parameters.items()
            }
        yield from copies.items()

    def _checkpoint(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        share = UpdateShare()
        for tensor in checkpoint_tensors(self._network.model):
            yield tensor.name, self._value(tensor, dtype, device, share)  # held by the caller alone
        rounded_alike = not has_lora(self._network) and dtype == resolve_dtype(self._spec.model.dtype) != torch.float32
        self._arrived = 1.0 if rounded_alike else share.value

    def _value(
        self, tensor: CheckpointTensor, dtype: torch.dtype, device: torch.device | str, share: UpdateShare
    ) -> torch.Tensor:
        """Compute one tensor of the checkpoint; every rank takes part."""
        with self._backend.gathered(tensor.parameters):
            exact = self._whole(tensor.source, tensor.value())
            value = exact.to(exact.dtype if tensor.is_buffer else dtype)
            if tensor.base is not None and value.dtype != exact.dtype:
                share.add(self._whole(tensor.base, tensor.base.detach()), exact, value)
            value = value.to(device).contiguous()
            if self._backend.shards_parameters and value.untyped_storage().data_ptr() == exact.untyped_storage().data_ptr():
                value = value.clone()  # gathered memory is freed at the end of the block
            return value

    def _whole(self, parameter: torch.nn.Parameter | None, part: torch.Tensor) -> torch.Tensor:
        """Gather the parts of a tensor like `parameter`, if ranks share weights."""
        split = self._network.weight_split
        return part if split is None or parameter is None else split.whole(parameter, part)


def _checksum(tensor: torch.Tensor) -> int:
    return int.from_bytes(hashlib.sha256(tensor.detach().numpy().data.cast("B")).digest()[:6], "big")
