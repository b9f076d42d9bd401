"""Comparison of vLLM and the trainer by layer: `rayrlhf doctor --parity MODEL`.

vLLM samples a response, with its kernels of prefill and of decoding; the trainer's network scores the same tokens, as in a
run. At every token it compares the states before the first layer and after each layer, and at every sampled token the final
norm, the logits and the log-probs.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

from rayrlhf.config.model import ModelSection, Precision
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.data.records import Rollout, RolloutRequest, SampleKey
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.engines.rollout.factory import check_rollout_backend
from rayrlhf.engines.scoring.frozen import autocast, score_sequences, training_device
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_architecture, load_tokenizer, resolve_dtype
from rayrlhf.models.logprobs import logits_into
from rayrlhf.models.network import build_network

PROMPT = "A whole number above 1 is prime if no other number but 1 divides it. The first primes are 2, 3, 5,"
"""It ends inside a sentence, so that the response does not end at once."""
NEW_TOKENS = 16
CONTEXT = 256
"""Longest prompt and response in tokens; the prompt is cut to the model's own context."""
TOLERANCES = {4: 1e-4, 2: 5e-2}
"""Bytes of the dtype -> largest relative difference of a state that counts as rounding."""


class Gap(NamedTuple):
    """Difference of trainer and engine at one place.

    Attributes:
        place: module of the trainer's model, or name of the state.
        absolute: largest difference of two numbers.
        relative: largest L2 norm of a token's difference, divided by that of the trainer's state. Of log-probs the largest
            difference, relative to numbers above 1.
    """

    place: str
    absolute: float
    relative: float


class Nats(NamedTuple):
    """Absolute log-prob gap over the sampled tokens: mean and largest, in nats."""

    mean: float
    largest: float


@dataclass(frozen=True)
class Parity:
    """Outcome of a comparison.

    Attributes:
        model: its path.
        dtype: compute dtype of both.
        tokens: compared tokens, of prompt and response.
        sampled: tokens of the response.
        tolerance: see `TOLERANCES`.
        gaps: in the order of the computation.
        nats: gap of the log-probs.
        float32_head: the same if both applied the output layer in float32 to their states; None in float32.
    """

    model: str
    dtype: str
    tokens: int
    sampled: int
    tolerance: float
    gaps: Sequence[Gap]
    nats: Nats
    float32_head: Nats | None

    @property
    def first_difference(self) -> Gap | None:
        """The first gap beyond the tolerance, NaN included."""
        return next((gap for gap in self.gaps if not gap.relative <= self.tolerance), None)

    def lines(self) -> list[str]:
        """Return the outcome as text."""
        width, first = max(len(gap.place) for gap in self.gaps), self.first_difference
        rows = [f"{gap.place:<{width}}  {gap.absolute:>18.2e}  {gap.relative:>8.1e}" for gap in self.gaps]
        verdict = "equal" if first is None else f"first difference at {first.place}, {first.relative:.1e} relative, beyond"
        lines = [
            f"{self.model} in {self.dtype}: vLLM and trainer on {self.tokens} tokens, {self.sampled} of them sampled",
            f"{'state after':<{width}}  {'largest difference':>18}  relative",
            *rows,
            f"{verdict} {'within ' if first is None else ''}{self.tolerance:g}",
            f"log-prob gap: {self.nats.mean:.2e} nats on average, {self.nats.largest:.2e} at most",
        ]
        if self.float32_head is not None:
            mean, largest = self.float32_head
            lines.append(f"with the output layer in float32 on both sides: {mean:.2e} on average, {largest:.2e} at most")
        return lines


def run_parity(path: str, dtype: str, *, as_json: bool, echo: Callable[[str], None]) -> bool:
    """Compare both sides of a model and print the result.

    Returns:
        True if they are equal within rounding.

    Raises:
        UserError: the model cannot be loaded or served, or its layers cannot be matched.
    """
    if dtype not in get_args(Precision):
        raise UserError(f"--dtype {dtype}: expected {', '.join(get_args(Precision))}")
    with ParityAudit(ModelSection.model_validate({"path": path, "dtype": dtype})) as audit:
        parity = audit.compare()
    echo(json.dumps(asdict(parity), indent=1) if as_json else "\n".join(parity.lines()))
    return parity.first_difference is None


class ParityAudit:
    """The trainer's network and a vLLM engine of one model, in this process.

    Attributes:
        engine: the engine. Weights that it receives are those of the next comparison.
    """

    def __init__(self, model: ModelSection) -> None:
        """Load the network and start the engine.

        Raises:
            UserError: the model cannot be loaded or served.
        """
        engine = check_rollout_backend(RolloutSection())
        self._model, self._dtype, self._device = model, resolve_dtype(model.dtype), training_device()
        text = load_architecture(model).get_text_config()
        context = min(CONTEXT, getattr(text, "max_position_embeddings", None) or CONTEXT)
        ids = load_tokenizer(model)(PROMPT)["input_ids"][: context - NEW_TOKENS]
        self._prompt = np.array(ids, dtype=np.int32)
        self._layers, self._width = int(text.num_hidden_layers), int(text.hidden_size)
        # Before the engine: vLLM patches classes of transformers.
        self._network = build_network(model, frozenset({"lm"}), "zero", 0)
        self._network.trunk.do_not_compile = True
        self._network.accept_packed_rows()  # as in a run, which then has other kernels of attention
        self._network.to(self._device)
        settings = {"backend": "vllm", "max_concurrent": 1, "max_model_length": context, "memory_gib": 0.25}
        self.engine: Any = engine(RolloutSpec(model, RolloutSection.model_validate(settings), seed=0, eager=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.engine.close()

    @torch.no_grad()
    def compare(self) -> Parity:
        """Sample a response, score it, and compare all states.

        Raises:
            UserError: the layers of the two models cannot be matched.
        """
        network, engine = self._network, self.engine.model
        with _Probe(self._decoder(engine), self._width).at_logits(engine) as served:
            request = RolloutRequest(SampleKey(0, 0, 0), self._prompt, seed=0)
            self.engine.submit([request], temperature=1.0, max_new_tokens=NEW_TOKENS)
            (rollout,) = self.engine.poll(1)
        probe = _Probe(self._decoder(network.trunk), self._width).at_end(network.trunk)
        with probe as trained, autocast(self._device, self._dtype):
            logprobs = self._scored(rollout)
        return self._parity(rollout, logprobs, served, trained)

    def _scored(self, rollout: Rollout) -> Tensor:
        (scores,) = score_sequences(
            self._network,
            [rollout.sequence()],
            frozenset({"logprobs"}),
            temperature=1.0,
            token_budget=CONTEXT,
            device=self._device,
        )
        return torch.from_numpy(np.asarray(scores.logprobs))

    def _decoder(self, model: nn.Module) -> nn.ModuleList:
        """Return the decoder layers of a model."""
        lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
        found = next((module for module in lists if len(module) == self._layers), None)
        if found is None:
            raise self._unmatched(f"a model has no list of {self._layers} layers")
        return found

    def _parity(self, rollout: Rollout, logprobs: Tensor, served: "_Probe", trained: "_Probe") -> Parity:
        sampled = len(rollout.response_ids)
        count = len(rollout.prompt_ids) + sampled - 1  # nothing is computed from the last token
        predictors = slice(count - sampled, count)
        name = next(name for name, module in self._network.model.named_modules() if module is trained.layers)
        gaps = [
            self._gap(f"{name}.{place - 1}" if place else "embedding", trained.state(place)[0], served.state(place), count)
            for place in range(self._layers + 1)
        ]
        final, engine_final = torch.cat(trained.final)[predictors], torch.cat(served.final)
        gaps.append(self._gap("final norm", final, [engine_final], sampled))
        gaps.append(self._gap("logits", self._logits(final, self._dtype), [torch.cat(served.logits)], sampled))
        apart = (logprobs - torch.from_numpy(rollout.logprobs)).abs()
        gaps.append(Gap("log-probs", float(apart.max()), float((apart / logprobs.abs().clamp(min=1)).max())))
        head = None
        if self._dtype != torch.float32:
            targets = torch.from_numpy(rollout.response_ids).long()
            ours, theirs = (
                self._logits(states, torch.float32).log_softmax(-1).gather(-1, targets[:, None])
                for states in (final, engine_final[:sampled])
            )
            head = _nats((ours - theirs).abs())
        tolerance = TOLERANCES[self._dtype.itemsize]
        within = [gap.relative <= tolerance for gap in gaps]
        if not all(within) and all(within[-3:]):
            raise self._unmatched(f"logits agree, and states after {gaps[within.index(False)].place} do not")
        dtype = str(self._dtype).removeprefix("torch.")
        return Parity(self._model.path, dtype, count + 1, sampled, tolerance, gaps, _nats(apart), head)

    def _logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the trainer's logits of final states [N, H], with the product in a dtype.

        They are float32 [N, V] on the CPU.
        """
        head, logits = self._network.model.get_output_embeddings(), self._network.check.logits
        buffer = torch.empty(len(hidden), len(head.weight), device=self._device)
        inputs = (hidden.to(self._device) * logits.scale).to(dtype)
        return logits_into(inputs, head.weight.to(dtype), head.bias, 1.0, buffer, logits.cap).cpu()

    def _gap(self, place: str, trainer: Tensor, engine: Sequence[Tensor], count: int) -> Gap:
        """Compare the first `count` rows with the nearest form of the engine's state."""
        if not engine or any(len(rows) < count for rows in (trainer, *engine)) or engine[0].shape[1] != trainer.shape[1]:
            raise self._unmatched(f"states after {place} have other shapes")
        found = []
        for form in engine:
            difference = trainer[:count] - form[:count]
            sizes = trainer[:count].norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
            relative = (difference.norm(dim=-1) / sizes).max()
            found.append(Gap(place, float(difference.abs().max()), float(relative)))
        return min(found, key=lambda gap: gap.relative)

    def _unmatched(self, reason: str) -> UserError:
        family = self._network.check.family
        return UserError(f"--parity {self._model.path}: layers of a {family} model cannot be matched: {reason}")


class _Probe:
    """Keeps what a model's layers compute while its block runs, in float32 on the CPU.

    Attributes:
        layers: the decoder layers.
        final: states after the final norm, of each forward pass.
        logits: of each forward pass.
    """

    def __init__(self, layers: nn.ModuleList, width: int) -> None:
        self.layers = layers
        self.final: list[Tensor] = []
        self.logits: list[Tensor] = []
        self._width = width
        self._kept: list[list[list[Tensor]]] = [[] for _ in range(len(layers) + 1)]
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._hooks.append(self.layers[0].register_forward_pre_hook(self._before, with_kwargs=True))
        self._hooks += [layer.register_forward_hook(partial(self._after, place)) for place, layer in enumerate(self.layers, 1)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def at_end(self, trunk: nn.Module) -> Self:
        """Also keep the final states of a transformers trunk."""
        self._hooks.append(trunk.register_forward_hook(lambda _, __, output: self.final.append(self._copy(output[0]))))
        return self

    def at_logits(self, model: nn.Module) -> Self:
        """Also keep what enters and leaves vLLM's output layer."""
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        for module in model.modules():
            if isinstance(module, LogitsProcessor):
                self._hooks.append(module.register_forward_hook(self._output_layer, with_kwargs=True))
        return self

    def state(self, place: int) -> list[Tensor]:
        """Return the forms of a state [N, H] after a number of layers."""
        passes = self._kept[place]
        forms = min((len(one) for one in passes), default=0)
        return [torch.cat([one[form] for one in passes]) for form in range(forms)]

    def _before(self, _: nn.Module, arguments: Iterable[Any], named: dict[str, Any]) -> None:
        self._kept[0].append(self._forms([*arguments, *named.values()]))

    def _after(self, place: int, _: nn.Module, __: Any, output: Any) -> None:
        self._kept[place].append(self._forms(output if isinstance(output, tuple | list) else [output]))

    def _output_layer(self, _: nn.Module, arguments: Sequence[Any], named: dict[str, Any], output: Tensor) -> None:
        hidden = next(value for value in (*arguments, *named.values()) if isinstance(value, Tensor))
        self.final.append(self._copy(hidden))
        self.logits.append(output.detach().to("cpu", torch.float32, copy=True))

    def _forms(self, values: Iterable[Any]) -> list[Tensor]:
        """Return the forms that a layer's state may have.

        Most layers of vLLM return the last block's output and the residual before it, which the next norm adds.
        """
        found = [
            self._copy(value)
            for value in values
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] == (self._width,)
        ]
        return [*found[:1], *(found[0] + rest for rest in found[1:2] if rest.shape == found[0].shape)]

    def _copy(self, state: Tensor) -> Tensor:
        """Return a copy [N, H]; vLLM's kernels change states in place."""
        return state.detach().to("cpu", torch.float32, copy=True).reshape(-1, self._width)


def _nats(apart: Tensor) -> Nats:
    return Nats(float(apart.mean()), float(apart.max()))
