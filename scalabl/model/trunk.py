"""The trunk: decoder blocks before the first adapted one, which run once for each input instead of once for each sample.

Hooks on the blocks after the trunk copy each input's row for its posterior samples (the rows "fan out"). They treat whatever
arguments an architecture gives its blocks, so that no architecture's forward is copied here. Another pair of hooks makes the
last block's MLP compute only the position whose logits are read. At start-up, `passes.probes` tests whether both are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scalabl.model.attachment import Host
from scalabl.model.forward_pass import running

Path = tuple[int | str, ...]  # of a tensor among arguments: the argument's place or name, then indices or keys within it
Change = Callable[[Tensor, Path], Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of a block's forward


def _blocks_of(host: Host, adapted: Sequence[str]) -> tuple[list[nn.Module], int] | None:
    """(all decoder blocks, index of the first with an adapted module); None if they are not in one list of blocks."""
    lists: set[str] = set()
    first: list[int] = []
    for name in adapted:
        parts = name.split(".")
        parents = (".".join(parts[:end]) for end in range(1, len(parts)))
        owner = next((path for path in parents if isinstance(host.modules[path], nn.ModuleList)), None)
        if owner is None:
            return None
        lists.add(owner)
        first.append(int(parts[owner.count(".") + 1]))
    if len(lists) != 1:
        return None
    return list(host.modules[lists.pop()].children()), min(first)


class _EndOfTrunk(Exception):
    """Raised by a hook to end a pass after the trunk."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


class Trunk:
    """The decoder blocks of a base model, split before the first that holds an adapted module.

    Args:
        adapted: names of the adapted modules without the head.

    Attributes:
        depth: the number of blocks before the first adapted one; 0 if only the head is adapted (`blocks` is empty then).
        possible: whether all adapted modules are in one list of blocks.
        verified: whether rows fan out after the trunk; `passes.probes` sets it if that changes no logit.
        trims: whether the last block's MLP computes only the position that is read; set likewise.
    """

    def __init__(self, host: Host, adapted: Sequence[str]) -> None:
        blocks = _blocks_of(host, adapted) if adapted else None
        self.possible, self.verified, self.trims = blocks is not None or not adapted, False, False
        self.blocks, self.depth = blocks or ([], 0)
        # Arguments of a block without an entry for each input, even if their length equals the number of inputs; and
        # arguments of a packed pass, [1, N, ...], with an entry for each token.
        self._shared_arguments: frozenset[Path] = frozenset()
        self._token_arguments: frozenset[Path] = frozenset()
        self._handles: list[RemovableHandle] = []

    @property
    def has_states(self) -> bool:
        """Whether its output can be stored, so that a later pass can begin after the trunk."""
        return self.verified and bool(self.blocks) and self.depth > 0

    def attach(self) -> None:
        """Register the hooks."""
        for index, block in enumerate(self.blocks[self.depth :]):
            hook = self._fan_out(first=index == 0)
            self._handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        if mlp := dict(self.blocks[-1].named_children()).get("mlp") if self.blocks else None:
            self._handles += [mlp.register_forward_pre_hook(self._trim), mlp.register_forward_hook(self._widen)]

    def _fan_out(self, *, first: bool) -> Callable[..., Arguments | None]:
        """A hook on a block after the trunk: arguments with an entry for each input get one for each row.

        Args:
            first: whether it is the first such block, where hidden states fan out or come from a stored trunk output.
        """

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            forward_pass = running()
            if forward_pass is None:
                return None
            inputs, output = forward_pass.inputs, forward_pass.trunk_output
            if inputs is None and (output is None or not first):
                return None
            hidden = _hidden(args, kwargs)
            others: dict[int | str, Any] = {place: value for place, value in enumerate(args) if place}
            others |= {name: value for name, value in kwargs.items() if name != "hidden_states"}
            if first and output is not None:
                hidden = output.to(hidden)
            if inputs is not None and forward_pass.packing is not None:
                source = forward_pass.packing.source
                hidden = hidden[:, source.to(hidden.device)] if first else hidden
                others = _changed(others, self._spread_tokens(source))
            elif inputs is not None:
                hidden = hidden[inputs.to(hidden.device)] if first else hidden
                if forward_pass.num_inputs > 1:  # with a single input, arguments are broadcast to all rows
                    others = _changed(others, self._spread_inputs(inputs, forward_pass.num_inputs))
            places = tuple(others[place] for place in range(1, len(args)))
            return (hidden, *places), {name: value for name, value in others.items() if isinstance(name, str)}

        return before

    def _spread_inputs(self, inputs: Tensor, num_inputs: int) -> Change:
        """The change that gives tensors with an entry for each input an entry for each row."""

        def change(value: Tensor, path: Path) -> Tensor:
            if not value.dim() or value.shape[0] != num_inputs or path in self._shared_arguments:
                return value
            return value[inputs.to(value.device)]

        return change

    def _spread_tokens(self, source: Tensor) -> Change:
        """The change that gives tensors with an entry for each token of the inputs an entry for each token of the rows."""
        return lambda value, path: value[:, source.to(value.device)] if path in self._token_arguments else value

    def _trim(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A hook before the last MLP: keeps only the position whose logits are read, [M, T, D] -> [M, 1, D].

        The block adds the MLP's output to every position by broadcasting; only that one is ever read. In a packed pass
        [1, N, D] -> [1, M, D].
        """
        forward_pass = running()
        if not self.trims or forward_pass is None or not args:
            return None
        hidden, last = args[0], forward_pass.last.to(args[0].device)
        if forward_pass.packing is not None:
            return hidden[:, last], *args[1:]
        return hidden[torch.arange(len(hidden), device=hidden.device), last].unsqueeze(1), *args[1:]

    def _widen(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """A hook after the last MLP of a packed pass: [1, M, D] -> [1, N, D], zeros where the MLP was not computed."""
        forward_pass = running()
        if not self.trims or forward_pass is None or forward_pass.packing is None:
            return None
        wide = output.new_zeros(1, forward_pass.packing.rows.tokens, output.shape[2])
        wide[:, forward_pass.last.to(output.device)] = output
        return wide

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def learn(self, run: Callable[[int], object]) -> None:
        """Find out which arguments of a block have no entry for each input: those whose length is not the number of inputs.

        An argument that short inputs do not have, such as the mask of a sliding window, is later judged by its length alone.

        Args:
            run: runs a pass over this number of inputs, in which nothing fans out.
        """
        seen: dict[int, dict[Path, int]] = {}

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {place: value for place, value in enumerate(args) if place} | kwargs
            seen[count] |= {path: tensor.shape[0] for path, tensor in _tensors(others, ())}

        handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks[self.depth :]]
        try:
            for count in (2, 3):
                seen[count] = {}
                run(count)
        finally:
            for handle in handles:
                handle.remove()
        self._shared_arguments = frozenset(path for path, size in seen[2].items() if (size, seen[3].get(path)) != (2, 3))

    def learn_packed(self, run: Callable[[int], int]) -> None:
        """Find out which arguments of a packed pass have an entry for each token.

        Args:
            run: runs a packed pass over this number of inputs, in which nothing fans out; returns its number of tokens.
        """
        seen: dict[int, dict[Path, int]] = {}
        tokens: list[int] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {place: value for place, value in enumerate(args) if place} | kwargs
            sizes = {path: tensor.shape[1] for path, tensor in _tensors(others, ()) if tensor.dim() > 1 and len(tensor) == 1}
            seen.setdefault(len(tokens), {}).update(sizes)

        handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks[self.depth :]]
        try:
            tokens += [run(2)]
            tokens += [run(3)]
        finally:
            for handle in handles:
                handle.remove()
        both = {path: [size, seen[1].get(path)] for path, size in seen[0].items()}
        self._token_arguments = frozenset(path for path, sizes in both.items() if sizes == tokens)

    def states(self, run: Callable[[], object]) -> Tensor:
        """The input of the first block after the trunk, [B, T, D], in the pass `run`, which is ended there."""

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _EndOfTrunk(_hidden(args, kwargs))

        handle = self.blocks[self.depth].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        try:
            run()
        except _EndOfTrunk as end:
            return end.states
        finally:
            handle.remove()
        raise AssertionError("the pass ended without running the first adapted block")

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Makes the blocks of the trunk return their input unchanged, for a pass that starts from the trunk's output."""
        skipped = self.blocks[: self.depth]
        # accelerate, for example, may have replaced a block's forward; that one is restored.
        own = [block.__dict__.get("forward") for block in skipped]
        for block in skipped:
            block.forward = _pass_on
        try:
            yield
        finally:
            for block, forward in zip(skipped, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _tensors(value: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    """(path, tensor) of every tensor with dimensions in nested tuples, lists and dicts."""
    if isinstance(value, Tensor) and value.dim():
        yield path, value
    elif isinstance(value, tuple | list | dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, (*path, key))


def _changed(value: Any, change: Change, path: Path = ()) -> Any:
    """A copy of nested tuples, lists and dicts in which `change` is applied to every tensor."""
    if isinstance(value, Tensor):
        return change(value, path)
    if isinstance(value, tuple | list):
        return type(value)(_changed(item, change, (*path, place)) for place, item in enumerate(value))
    if isinstance(value, dict):
        return {key: _changed(item, change, (*path, key)) for key, item in value.items()}
    return value
