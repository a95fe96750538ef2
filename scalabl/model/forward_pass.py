"""The object that describes one forward pass, and the one place where the running pass can be found.

Adapted layers, trunk hooks, the head and the attention of packed passes are called by transformers, with transformers'
arguments. What else they need to know, they read from the pass that runs on their thread.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from scalabl.model.packing import Packing
from scalabl.model.past import Past


@dataclass(frozen=True, eq=False)
class RowSamples:
    """Which posterior sample each row of a pass uses.

    Attributes:
        s: [S, P], sampled subspace scalars; P is the total over the adapted layers, each owning R columns.
        sample: [M] int64, the row of `s` for each row of the pass.
        fan_out: consecutive rows that are samples of one input; 1 where their numbers differ.
        inputs: [M] int64, the input of each row; None where each row has an input of its own.
        draws: `Draws.key` of the different draws, in the order in which their samples stand in `s`; needed with a past.
    """

    s: Tensor
    sample: Tensor
    fan_out: int = 1
    inputs: Tensor | None = None
    draws: tuple[Hashable, ...] = ()


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """One pass over B right-padded inputs and M rows. Nothing of it changes once it is made.

    Causal attention never looks right, so right padding needs no mask and cannot reach an answer.

    Attributes:
        input_ids: [B, T] int64. lengths: [B] int64, 1 <= lengths <= T.
        samples: what the rows are; None runs the base model without its adapter, with one row for each input.
        packing: where the rows' tokens lie in a pass without padding; the inputs then stand in order of their lengths.
        states: [B, T, D], what `ScalaBLModel.trunk_states` gave for the same inputs; the trunk then does not run.
        past: the tokens before these, the same ones for all inputs.
        keeps: whether the pass's keys and values are wanted, those of its past included.
        spreads_in_blocks: whether rows fan out before the first adapted decoder block; else at the head. The model sets it.
    """

    input_ids: Tensor
    lengths: Tensor
    samples: RowSamples | None = None
    packing: Packing | None = None
    states: Tensor | None = None
    past: Past | None = None
    keeps: bool = False
    spreads_in_blocks: bool = True

    @property
    def inputs(self) -> Tensor | None:
        """[M], the input of each row; None where nothing fans out."""
        return None if self.samples is None else self.samples.inputs

    @property
    def num_inputs(self) -> int:
        """B."""
        return int(self.input_ids.shape[0])

    @cached_property
    def last(self) -> Tensor:
        """The position whose logits are read: [M] where rows fan out in the blocks, [B] where they do at the head.

        Positions of a packed pass count the tokens of all rows.
        """
        spread = self.inputs is not None and self.spreads_in_blocks
        if self.packing is not None:
            return (self.packing.rows if spread else self.packing.inputs).last
        return (self.lengths[self.inputs] if spread else self.lengths) - 1

    @cached_property
    def token_ids(self) -> Tensor:
        """What the base model is given: [B, T], or [1, N] without padding."""
        return self.input_ids if self.packing is None else self.packing.pack(self.input_ids)

    @cached_property
    def trunk_output(self) -> Tensor | None:
        """`states` in the form of `token_ids`: [B, T, D] or [1, N, D]."""
        return self.states if self.packing is None or self.states is None else self.packing.pack(self.states)


class _Thread(threading.local):
    forward_pass: ForwardPass | None = None


_thread = _Thread()


def running() -> ForwardPass | None:
    """The pass that runs on this thread; None outside of one."""
    return _thread.forward_pass


class enter(AbstractContextManager[None]):
    """The pass runs on this thread until the block ends, however it ends. It may be entered again afterwards.

    Raises:
        RuntimeError: another pass runs on this thread.
    """

    def __init__(self, forward_pass: ForwardPass) -> None:
        self._forward_pass = forward_pass

    def __enter__(self) -> None:
        if _thread.forward_pass is not None:
            raise RuntimeError("a forward pass cannot begin while another one runs on the same thread")
        _thread.forward_pass = self._forward_pass

    def __exit__(self, *_: object) -> None:
        _thread.forward_pass = None


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The rule for gradient checkpointing: a layer that runs again in the backward pass runs in the pass of its first run.

    For `context_fn` of `torch.utils.checkpoint.checkpoint`, which calls it before the first run and enters the second
    context for the run in the backward pass, when no pass runs any more.
    """
    forward_pass = running()
    return nullcontext(), nullcontext() if forward_pass is None else enter(forward_pass)
