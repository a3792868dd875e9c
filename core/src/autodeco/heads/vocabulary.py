"""The vocabulary as one rank sees it: all of it, or a slice of equal size on each tensor rank.

Whatever the objective sums over the vocabulary is then a sum over ranks of a few numbers a token,
and the head of a distribution is the merge of the ranks' own heads. Every rank of the group gets
the same bits, so that all take the same decisions and make the same calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from autodeco.engines.base import OutputWeight


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens a rank's logits stand for.

    Attributes:
        size: V, over all ranks.
        first: The token id of the first column.
        group: The process group that shares the vocabulary; None: this rank has all of it.
    """

    size: int
    first: int = 0
    group: Any = None

    @classmethod
    def of(cls, output: OutputWeight) -> Vocabulary:
        """Returns the vocabulary of an engine's output layer.

        Raises:
            ValueError: The rows are not the whole vocabulary, and no group shares it.
        """
        ranks = 1 if output.group is None else dist.get_world_size(output.group)
        if ranks * output.weight.shape[0] != output.vocab_size:
            raise ValueError(
                f"{ranks} ranks with {output.weight.shape[0]} rows each do not make up the "
                f"{output.vocab_size} rows of the output weight"
            )
        return cls(output.vocab_size, output.first_token, output.group if ranks > 1 else None)

    def sum(self, part: Tensor) -> Tensor:
        """Returns the sum of every rank's tensor."""
        if self.group is None:
            return part
        total = part.contiguous().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def gather(self, part: Tensor) -> Tensor:
        """Returns the tensors of all ranks in the order of their tokens, [ranks, ...]."""
        if self.group is None:
            return part.unsqueeze(0)
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, part, group=self.group)
        return torch.stack(parts)

    def label_logit(self, logits: Tensor, label: Tensor) -> Tensor:
        """Returns the label's logit, [n, 1], from logits [n, V_local] and labels [n]."""
        column = label.unsqueeze(-1) - self.first
        if self.group is None:
            return logits.gather(-1, column)
        mine = (column >= 0) & (column < logits.shape[-1])
        own = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1))
        return self.sum(own.masked_fill(~mine, 0.0))

    def arg_max(self, logits: Tensor) -> Tensor:
        """Returns the id of the largest logit of each row, the smallest of equals, int64 [n]."""
        column = logits.argmax(-1)
        if self.group is None:
            return column
        values = self.gather(logits.gather(-1, column.unsqueeze(-1))[:, 0])
        ids = self.gather(column + self.first)
        # argmax takes the first of equals: of ranks with the same value, the one of smaller ids
        return ids.gather(0, values.argmax(0, keepdim=True))[0]
