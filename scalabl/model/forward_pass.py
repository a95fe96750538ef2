"""The object that describes one forward pass, and the lookup of the pass that is running. Passes run in `scalabl_model`.

transformers calls the adapted layers, trunk hooks, head and packed attention with its own arguments. Anything else that they
need, they read from the pass that is running on their thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from scalabl.model.packing import Packing
from scalabl.model.past import Past


class UnknownRowsError(RuntimeError):
    """An adapted layer gets entries of which it is not known to which rows of the pass they belong."""


@dataclass(frozen=True, eq=False)
class Share:
    """One adapter's part of a pass that several adapters share.

    Attributes:
        rows: [M'] int64, the adapter's rows of the pass.
        samples: the samples of these rows, with the adapter's own members.
        head: ([M', D], samples) -> [M', C], the adapter's head.
    """

    rows: Tensor
    samples: RowSamples
    head: Callable[[Tensor, RowSamples], Tensor]


@dataclass(frozen=True, eq=False)
class RowSamples:
    """Which posterior sample each row of a pass uses.

    Attributes:
        s: [S, P], sampled subspace scalars; P is the total over the adapted layers, each of which has R columns.
        sample: [M] int64, the row of `s` for each row of the pass.
        fan_out: the number of consecutive rows that are samples of one input; 1 if inputs have different numbers.
        inputs: [M] int64, the input of each row; None if each row has an input of its own.
        draws: `Draws.key` of the distinct draws, in the order of their samples in `s`; needed with a past.
        member: [S] int64, the member of the posterior that each row of `s` is drawn from; None if there is only one.
        shares: where the rows belong to several adapters (`passes.side_by_side`): each adapter's part of the pass, with
            which the head is computed. Empty if all rows belong to the adapter that runs the pass.
        matrices: with several adapters, the first column of a layer in `s` -> A [L, R, d_in] and B [L, d_out, R] of the
            members of all adapters, which `member` counts together.
    """

    s: Tensor
    sample: Tensor
    fan_out: int = 1
    inputs: Tensor | None = None
    draws: tuple[Hashable, ...] = ()
    member: Tensor | None = None
    shares: Sequence[Share] = ()
    matrices: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(eq=False)
class HeadStates:
    """Where the head of a pass leaves the hidden states that it reads: `rows` [M, D], in the order of the rows."""

    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Reading:
    """What passes compute for one input.

    Attributes:
        logits: [K, C] float32, before the temperature.
        state: [D] float32, the hidden state that the head reads, averaged over the K samples; empty where nobody can see it.
    """

    logits: Tensor
    state: Tensor

    def and_then(self, later: Reading) -> Reading:
        """This reading and one of further samples of the same input, as one."""
        logits = torch.cat([self.logits, later.logits])
        return Reading(logits, torch.lerp(self.state, later.state, len(later.logits) / len(logits)))

    def cpu(self) -> Reading:
        """The same reading on the CPU."""
        return Reading(self.logits.cpu(), self.state.cpu())


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """One pass over B right-padded inputs that fan out to M rows, one for each sample of an input. Immutable.

    With causal attention a token never sees those to its right, so right padding needs no mask and changes no answer.

    Attributes:
        input_ids: [B, T] int64. lengths: [B] int64, 1 <= lengths <= T.
        samples: the posterior samples of the rows; None runs the base model without the adapter, one row for each input.
        packing: the token positions of a packed pass (one without padding); its inputs are in order of length.
        states: [B, T, D], the output of `ScalaBLModel.trunk_states` for the same inputs; the trunk is then not run.
        past: the tokens before these, the same for all inputs.
        keeps: whether to store the pass's keys and values, including those of its past.
        spreads_in_blocks: whether rows fan out before the first adapted decoder block, rather than at the head. The model
            sets it.
        head_states: receives the hidden states that the head reads; None to drop them.
    """

    input_ids: Tensor
    lengths: Tensor
    samples: RowSamples | None = None
    packing: Packing | None = None
    states: Tensor | None = None
    past: Past | None = None
    keeps: bool = False
    spreads_in_blocks: bool = True
    head_states: HeadStates | None = None

    @property
    def inputs(self) -> Tensor | None:
        """[M], the input of each row; None if rows do not fan out."""
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

    @property
    def num_rows(self) -> int:
        """M."""
        return self.num_inputs if self.samples is None else len(self.samples.sample)

    def by_row(self, x: Tensor) -> Tensor:
        """An adapted layer's input with the pass's rows as its first dimension; of a packed pass, [N, D].

        Some layers get the tokens of all rows in one dimension (the experts' side of a mixture of experts, OPT's MLP).

        Args:
            x: [M, ..., D], or [M * T, D] in the order of the rows; in a packed pass [1, N, D], [N, D] or one entry for each
                row.

        Raises:
            UnknownRowsError: x has neither all tokens nor one entry for each row.
        """
        entries = x.shape[:-1].numel()
        if self.packing is not None:
            tokens = self.packing.rows.tokens
            if entries in (tokens, self.num_rows):
                return x.flatten(0, -2)
        else:
            tokens = self.num_rows * self.input_ids.shape[1]
            if x.shape[0] == self.num_rows:
                return x
            if entries == tokens:
                return x.reshape(self.num_rows, -1, x.shape[-1])
        raise UnknownRowsError(f"a layer gets {entries} entries in a pass with {tokens} tokens of {self.num_rows} rows")

    @property
    def width(self) -> int:
        """P + T: the tokens of the longest input, with those of the past."""
        return int(self.input_ids.shape[1]) + (0 if self.past is None else self.past.length)

    @cached_property
    def token_mask(self) -> Tensor:
        """[B, P + T] int64, 1 where there is a token; P tokens of the past."""
        places = torch.arange(self.input_ids.shape[1], device=self.lengths.device)
        mask = (places < self.lengths.unsqueeze(1)).long()
        return mask if self.past is None else torch.cat([mask.new_ones(len(mask), self.past.length), mask], dim=1)

    def divided(self, longest: int) -> list[tuple[Tensor, ForwardPass]]:
        """This pass as one pass for the inputs of at most `longest` tokens and one for the others: (rows, pass) of each."""
        short = self.lengths + (0 if self.past is None else self.past.length) <= longest
        return [(rows, part) for which in (short, ~short) for rows, part in self._only(which)]

    def _only(self, chosen: Tensor) -> list[tuple[Tensor, ForwardPass]]:
        """The pass over the chosen inputs [B] bool, with its rows in this pass; empty if no input is chosen."""
        inputs = chosen.nonzero().squeeze(1)
        if not len(inputs):
            return []
        of_row = torch.arange(self.num_rows, device=chosen.device) if self.inputs is None else self.inputs
        rows = chosen[of_row].nonzero().squeeze(1)
        lengths = self.lengths[inputs]
        width = int(lengths.max())
        samples = self.samples
        if samples is not None:
            places = chosen.cumsum(0) - 1
            spread = None if samples.inputs is None else places[samples.inputs[rows]]
            samples = replace(samples, sample=samples.sample[rows], inputs=spread)
        packing = self.packing
        if packing is not None:
            packing = Packing.of(lengths, torch.bincount(of_row, minlength=len(chosen))[inputs].tolist())
        part = replace(
            self,
            input_ids=self.input_ids[inputs, :width],
            lengths=lengths,
            samples=samples,
            packing=packing,
            states=None if self.states is None else self.states[inputs, :width],
        )
        return [(rows, part)]

    @cached_property
    def token_ids(self) -> Tensor:
        """The token ids that the base model gets: [B, T], or [1, N] in a packed pass."""
        return self.input_ids if self.packing is None else self.packing.pack(self.input_ids)

    @cached_property
    def trunk_output(self) -> Tensor | None:
        """`states` in the form of `token_ids`: [B, T, D] or [1, N, D]."""
        return self.states if self.packing is None or self.states is None else self.packing.pack(self.states)


class _Thread(threading.local):
    forward_pass: ForwardPass | None = None


_thread = _Thread()


def running() -> ForwardPass | None:
    """The pass that is running on this thread; None if there is none."""
    return _thread.forward_pass


class enter(AbstractContextManager[None]):
    """Context manager: makes a pass the running one on this thread until the block ends, even by an exception.

    Raises:
        RuntimeError: another pass is running on this thread.
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
    """Gradient checkpointing: a layer that is recomputed in the backward pass sees the pass of its first computation.

    For the argument `context_fn` of `torch.utils.checkpoint.checkpoint`. It is called before the first computation, and the
    second context is entered for the recomputation, when no pass is running any more.
    """
    forward_pass = running()
    return nullcontext(), nullcontext() if forward_pass is None else enter(forward_pass)
