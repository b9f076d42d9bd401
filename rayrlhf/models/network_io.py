"""Inputs and outputs of a network's forward."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Head = Literal["lm", "value"]
OutputName = Literal["logprobs", "entropy", "values", "hidden", "divergence", "routing", "experts", "load"]


class Positions(NamedTuple):
    """Positions to read in a padded batch [B, L], as flat indices.

    The flat index of position t in row b is b * L + t.

    Attributes:
        predictors: int64 [N], the position that predicts each response token.
        targets: int64 [N], the response tokens.
        values: int64 [M], positions of values: before each response token, and after the last one.
        lengths: tokens of each sample without padding.
        packed: samples are end to end in one row [1, sum of lengths], instead of one row each.
        parents: the row is a prefix tree: `lengths` are those of its segments, and this is the segment that each one continues,
            or -1. None for whole samples. Needs `packed`, and a network whose check allows it.
        places: for each sample the index of each of its tokens in the flattened batch, int64; empty if no layers are cached.
        experts: int16 [B * L, layers, experts per token] to replay, -1 for the router's own choice; None without any.
    """

    predictors: Tensor
    targets: Tensor
    values: Tensor
    lengths: list[int]
    packed: bool = False
    parents: list[int] | None = None
    places: Sequence[NDArray[np.int64]] = ()
    experts: Tensor | None = None


class TeacherSignal(NamedTuple):
    """Teacher outputs at N positions: hidden states, or most likely tokens.

    See `rayrlhf.models.distillation`.

    Attributes:
        hidden: float32 [N, H], for `Network.teacher_layer`; None if `ids` is set.
        ids: int64 [N, K], or None.
        logprobs: float32 [N, K + 1], or None.
        beta: of the divergence.
    """

    hidden: Tensor | None = None
    ids: Tensor | None = None
    logprobs: Tensor | None = None
    beta: float = 0.0


class NetworkOutput(NamedTuple):
    """Requested outputs, flat in the order of the positions; None for the rest.

    A NamedTuple, so that module hooks see the tensors.

    Attributes:
        logprobs: float32 [N].
        entropy: float32 [N], nats.
        values: float32 [M].
        hidden: [N, H], the final hidden state at each predictor.
        divergence: float32 [N], from a teacher, nats.
        routing: float32 [N], 1 where a router of the predictor would have chosen other experts than the replayed ones.
        experts: int16 [B * L, layers, experts per token], those of this forward.
        load: float32 [2, layers, E], load of the experts; see `RouterLoad.total`.
    """

    logprobs: Tensor | None
    entropy: Tensor | None
    values: Tensor | None
    hidden: Tensor | None
    divergence: Tensor | None = None
    routing: Tensor | None = None
    experts: Tensor | None = None
    load: Tensor | None = None
