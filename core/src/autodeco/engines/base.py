"""The protocol that every engine follows: frozen backbone in, hidden states out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """One or more whole sequences, packed flat.

    Attributes:
        ids: int64 [n], token ids.
        positions: int64 [n], restarting at 0 in each sequence.
        cu_seqlens: int32 [b + 1], where each of the b sequences begins and the last one ends.
        predict: bool [n], True where the hidden state predicts a completion token, ``ids[i + 1]``.
        sample_id: int64 [n], the sample that each token belongs to.
    """

    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    predict: Tensor
    sample_id: Tensor


@dataclass(frozen=True)
class HiddenBatch:
    """The last hidden states of the m positions whose `TokenBatch.predict` is True.

    Attributes:
        h: [m, d] in the backbone's dtype, behind the final norm.
        label: int64 [m], the token that follows.
        sample_id: int64 [m].
        token_index: int64 [m], the position inside its sample; (sample_id, token_index) is the
            key of the random drop and of the cache of hidden states.
    """

    h: Tensor
    label: Tensor
    sample_id: Tensor
    token_index: Tensor


@dataclass(frozen=True)
class OutputWeight:
    """This rank's rows of the output layer.

    Attributes:
        weight: [V_local, d] in the backbone's dtype.
        first_token: The token id of row 0.
        vocab_size: V, over all ranks.
        group: The process group whose ranks hold the other rows, in the order of their ids; None:
            the weight is whole.
    """

    weight: Tensor
    first_token: int
    vocab_size: int
    group: Any = None


class Engine(Protocol):
    """What executes the frozen backbone. No gradient ever enters it."""

    name: str
    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    vocab_size: int
    #: Which share of the data this rank's copy of the model gets, of how many.
    data_rank: int
    data_world: int
    #: Whether this rank speaks for its copy: of the ranks that hold one, exactly one does.
    counts: bool
    #: Whether it has whole samples; context-parallel ranks have parts of each.
    whole_samples: bool
    #: Whether a microbatch costs its tokens, or as many as its padded rows have.
    packs: bool
    #: Pipeline stages: how many microbatches are worked on at the same time.
    stages: int

    def hidden_states(self, batches: Iterable[TokenBatch]) -> Iterator[HiddenBatch | None]:
        """Yields one `HiddenBatch` a batch, in order; None off the last pipeline stage."""
        ...

    def output_weight(self) -> OutputWeight:
        """Returns this rank's rows of the output layer."""
        ...

    def fingerprint(self) -> str:
        """Returns a sha256 over the names, dtypes, shapes and bytes of the frozen backbone."""
        ...
