"""Sequence parallelism: the ranks of a group compute different columns of the same rows.

Every layer but the attention works on single tokens, so a rank runs it on its own columns. Around the attention an all-to-all
exchanges columns for heads, and a second one changes back (Jacobs et al. 2023, "DeepSpeed Ulysses", section 3). If the heads
are not divisible by the ranks, each rank gathers the keys and values of all columns instead.

Losses are unchanged. The network gathers its outputs, and every rank of the group computes the same loss from all of them. The
backward pass returns to each rank the gradient at its own outputs, so the gradient of the loss is the sum over all ranks, as
with data parallelism.
"""

from itertools import accumulate
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from rayrlhf.library_types import PreTrainedModel
from rayrlhf.models.packed_attention import NAME as SEGMENTS
from rayrlhf.models.packed_attention import Segments, SegmentsError
from rayrlhf.models.rank_group import RankGroup

if TYPE_CHECKING:
    from rayrlhf.models.network_io import NetworkOutput, Positions, TeacherSignal

NAME = "rayrlhf_row_split"
"""Name of the attention in transformers' registry."""


class OwnPart(NamedTuple):
    """Positions and teacher outputs in the columns of one rank.

    Attributes:
        positions: with indices into the rank's columns [B, columns].
        teacher: at these predictors.
        predictors: int64 [n], places of these predictors among all.
        values: int64 [m], the same for values.
        sizes: numbers of all predictors and values.
    """

    positions: "Positions"
    teacher: "TeacherSignal | None"
    predictors: Tensor
    values: Tensor
    sizes: tuple[int, int]


class RowSplit(RankGroup):
    """Equal columns of padded or packed rows, one part per rank of a group.

    Rows whose length the ranks do not divide are padded on the right.
    """

    def columns(self, width: int) -> slice:
        """Return this rank's columns of a row of `width` tokens after padding."""
        own = -(-width // self.size)
        return slice(self.rank * own, (self.rank + 1) * own)

    def own(self, rows: Tensor) -> Tensor:
        """Return this rank's columns [B, columns, ...] of [B, L, ...], zero beyond L."""
        width = rows.shape[1]
        return pad(rows, (*(0, 0) * (rows.ndim - 2), 0, -width % self.size))[:, self.columns(width)]

    def inputs(self, input_ids: Tensor, lengths: list[int], *, packed: bool) -> dict[str, Any]:
        """Return the trunk's arguments for this rank's columns of int64 [B, L]."""
        count, width = input_ids.shape
        starts = lengths if packed else [width]
        places = torch.cat([torch.arange(length, device=input_ids.device) for length in starts])[None]
        parts = [length for length in (*lengths, -width % self.size) if length]
        return {
            "input_ids": self.own(input_ids),
            "position_ids": self.own(places).expand(count, -1),
            "segments": Segments.of(parts, None, input_ids.device) if packed else None,
            "row_split": self,
        }

    def part(self, positions: "Positions", teacher: "TeacherSignal | None", width: int) -> OwnPart:
        """Return this rank's part of rows of `width` tokens."""
        columns = self.columns(width)
        size = columns.stop - columns.start

        def mine(flat: Tensor) -> tuple[Tensor, Tensor]:
            """Return places among all, and indices into the own columns."""
            places = ((flat % width) // size == self.rank).nonzero().flatten()
            chosen = flat[places]
            return places, (chosen // width) * size + chosen % width - columns.start

        predictors, predicting = mine(positions.predictors)
        values, valued = mine(positions.values)
        own = positions._replace(predictors=predicting, targets=positions.targets[predictors], values=valued)
        if teacher is not None:
            own_rows = {name: field[predictors] for name, field in teacher._asdict().items() if isinstance(field, Tensor)}
            teacher = type(teacher)(**own_rows, beta=teacher.beta)
        return OwnPart(own, teacher, predictors, values, (len(positions.predictors), len(positions.values)))

    def join(self, output: "NetworkOutput", part: OwnPart) -> "NetworkOutput":
        """Return the outputs at the positions of all ranks."""

        def whole(name: str, field: Tensor) -> Tensor:
            index = int(name == "values")
            places = (part.predictors, part.values)[index]
            joined: Tensor = _Join.apply(field.float(), places, part.sizes[index], self.group)  # type: ignore[no-untyped-call]
            return joined.to(field.dtype)

        fields = {name: whole(name, field) for name, field in output._asdict().items() if field is not None}
        return output._replace(**fields)

    @torch.no_grad()
    def gather(self, states: Tensor, width: int) -> Tensor:
        """Return whole rows [B, L, H] from the columns [B, columns, H] of all ranks."""
        parts = [torch.empty_like(states) for _ in range(self.size)]
        torch.distributed.all_gather(parts, states.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)[:, :width]


def split_attention(trunk: PreTrainedModel) -> None:
    """Make a trunk that attends within segments exchange columns for heads around it.

    Its forward must then be passed `RowSplit.inputs` every time.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _row_split_attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    trunk.set_attn_implementation(NAME)


def _row_split_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_split: RowSplit | None = None,
    segments: Segments | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Attention of this rank's columns [B, heads, columns, d] to whole rows."""
    if row_split is None:
        raise SegmentsError(f"{type(module).__name__} does not pass `row_split`")
    split, size = row_split, row_split.size
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves the results of norms in float32
    if query.shape[1] % size:
        return _attend_to_gathered(split, query, key, value, segments, rest.get("scaling")), None
    repeats = key_copies(query.shape[1], key.shape[1], size)
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    query, key, value = _to_heads(split, query, key, value)
    own = SimpleNamespace(is_causal=True, num_key_value_groups=query.shape[1] // key.shape[1], training=module.training)
    from transformers import AttentionInterface

    whole, _ = AttentionInterface()[SEGMENTS](own, query, key, value, None, segments=segments, **rest)
    return _to_columns(split, whole), None


def key_copies(heads: int, key_heads: int, size: int) -> int:
    """Return how often a rank holds the keys of its share.

    Key heads are repeated until the ranks divide them. Where the ranks do not divide the heads, each holds whole rows.
    """
    if heads % size:
        return size
    count = next(count for count in range(1, size + 1) if key_heads * count % size == 0)
    return count if heads % (key_heads * count) == 0 else heads // key_heads


def _to_heads(split: RowSplit, *tensors: Tensor) -> list[Tensor]:
    """Exchange columns [B, heads, columns, d] for heads [B, heads / size, L, d].

    It takes one collective.
    """
    size = split.size
    shapes = [(count, heads // size, columns, width) for count, heads, columns, width in (one.shape for one in tensors)]
    parts = [
        one.reshape(shape[0], size, *shape[1:]).transpose(0, 1).reshape(size, -1)
        for one, shape in zip(tensors, shapes, strict=True)
    ]
    exchanged = _exchange(torch.cat(parts, dim=1), split)
    split_again = torch.split(exchanged, [part.shape[1] for part in parts], dim=1)
    return [
        one.reshape(size, *shape).permute(1, 2, 0, 3, 4).reshape(shape[0], shape[1], size * shape[2], shape[3])
        for one, shape in zip(split_again, shapes, strict=True)
    ]


def _to_columns(split: RowSplit, attended: Tensor) -> Tensor:
    """Exchange heads [B, L, heads / size, d] for columns [B, columns, heads, d]."""
    count, length, heads, width = attended.shape
    parts = attended.reshape(count, split.size, length // split.size, heads, width).transpose(0, 1).contiguous()
    exchanged = _exchange(parts, split)
    return exchanged.permute(1, 2, 0, 3, 4).reshape(count, length // split.size, split.size * heads, width)


def _exchange(parts: Tensor, split: RowSplit) -> Tensor:
    return cast("Tensor", _Exchange.apply(parts, split.group))  # type: ignore[no-untyped-call]


def _attend_to_gathered(
    split: RowSplit, query: Tensor, key: Tensor, value: Tensor, segments: Segments | None, scaling: float | None
) -> Tensor:
    """Attention of the own columns to the gathered keys and values, [B, columns, heads, d].

    Later columns have longer rows of keys, so the ranks' work differs.
    """
    both = torch.cat([key, value], dim=-1)
    shape = both.shape
    gathered = cast("Tensor", _Gather.apply(both, split.group))  # type: ignore[no-untyped-call]
    key, value = gathered.movedim(0, 2).reshape(*shape[:2], -1, shape[3]).tensor_split([key.shape[-1]], dim=-1)
    columns, length = split.columns(key.shape[2]), key.shape[2]
    outputs, start = [], 0
    for end in accumulate([length] if segments is None else segments.lengths):
        first, last = max(start, columns.start), min(end, columns.stop)
        if first < last:
            mask = None
            if first > start:
                mask = torch.ones(last - first, last - start, dtype=torch.bool, device=query.device).tril(first - start)
            outputs.append(
                scaled_dot_product_attention(
                    query[:, :, first - columns.start : last - columns.start],
                    key[:, :, start:last],
                    value[:, :, start:last],
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=scaling,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
        start = end
    return torch.cat(outputs, dim=2).transpose(1, 2)


class _Exchange(torch.autograd.Function):
    """All-to-all of [size, ...]: part i goes to rank i. It is its own transpose."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        found = torch.empty_like(parts, memory_format=torch.contiguous_format)
        torch.distributed.all_to_all_single(found, parts.contiguous(), group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(gradients[0], ctx.group), None  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    """All-gather [...] -> [size, ...]; backward sums the gradients of all ranks at the owner."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group = group
        found = own.new_empty(torch.distributed.get_world_size(group), *own.shape)
        torch.distributed.all_gather_into_tensor(found.view(-1), own.contiguous().view(-1), group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = torch.empty_like(gradients[0][0], memory_format=torch.contiguous_format)
        torch.distributed.reduce_scatter_tensor(total.view(-1), gradients[0].contiguous().view(-1), group=ctx.group)
        return total, None


class _Join(torch.autograd.Function):
    """Entries [n, ...] of all ranks at their places in [N, ...].

    The backward pass returns the gradient at the own entries. Nothing is summed: all ranks compute one loss from one table.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, places: Tensor, size: int, group: Any) -> Tensor:
        ctx.save_for_backward(places)
        table = own.new_zeros(size, *own.shape[1:])
        table[places] = own
        torch.distributed.all_reduce(table, group=group)
        return table

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0][ctx.saved_tensors[0]], None, None, None
