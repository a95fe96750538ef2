"""What need not be computed: the blocks before the first stochastic layer for each sample (the trunk), and what the last
block's MLP gives at positions that nobody reads.

Rows fan out to posterior samples by hooks on the blocks after the trunk, with whatever arguments the architecture gives
them, so that no architecture's forward is copied here. What is adapted, and the pass itself, are `model`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scalabl.model.attachment import Host
from scalabl.model.packing import Packing

Path = tuple[int | str, ...]  # of an argument: its place or name, and the places or keys within it


class FanOut:
    """Which input each row of the running pass belongs to; shared by the blocks of one model.

    Attributes:
        inputs: [M] int64; None where the pass has a row for each of its inputs and nothing fans out.
        count: B, the inputs of the pass.
        states: [B, T, D], what the trunk gave for these inputs; None to run it.
        last: [M], the position that is read of each row.
        packing: of a pass without padding, where blocks see one row [1, N, D]; None for a padded one.
        shared: which of a block's arguments were seen not to have an entry for each input, as long as they may be.
        by_token: which of a packed pass's arguments, [1, N, ...], were seen to have an entry for each token.
    """

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        self.last: Tensor | None = None
        self.count = 0
        self.states: Tensor | None = None
        self.packing: Packing | None = None
        self.shared: frozenset[Path] = frozenset()
        self.by_token: frozenset[Path] = frozenset()


def _blocks_of(host: Host, adapted: Sequence[str]) -> tuple[list[nn.Module], int] | None:
    """(all decoder blocks, the first that holds one of `adapted`); None where these are not all in one list of blocks."""
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


class _Reached(Exception):
    """Ends a pass where the trunk ends."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


class Trunk:
    """The decoder blocks of a base model, split before the first that holds an adapted module.

    Args:
        adapted: names of the adapted modules without the head.

    Attributes:
        depth: how many blocks come before any adapted one; all of them when only the head is adapted.
        possible: whether the adapted modules are in one list of blocks.
        verified: whether rows fan out after the trunk: it has been seen to give the numbers of a pass without it.
        trims: whether the last block's MLP computes only the position that is read; seen likewise.
    """

    def __init__(self, host: Host, adapted: Sequence[str], fan_out: FanOut) -> None:
        found = _blocks_of(host, adapted) if adapted else None
        self.possible, self.verified, self.trims = found is not None or not adapted, False, False
        self.blocks, self.depth = found or ([], 0)
        self._fan_out = fan_out
        self._handles: list[RemovableHandle] = []

    @property
    def has_states(self) -> bool:
        """Whether what it gives can be kept, and a pass begin after it."""
        return self.verified and bool(self.blocks) and self.depth > 0

    def attach(self) -> None:
        """Put the hooks in."""
        for index, block in enumerate(self.blocks[self.depth :]):
            hook = _hook(self._fan_out, first=index == 0)
            self._handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        if mlp := dict(self.blocks[-1].named_children()).get("mlp") if self.blocks else None:
            self._handles += [mlp.register_forward_pre_hook(self._trim), mlp.register_forward_hook(self._widen)]

    def _trim(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """[M, T, D] -> [M, 1, D]: the block adds the MLP's output to every position, and only this one is read.

        [1, N, D] -> [1, M, D] of a packed pass.
        """
        last = self._fan_out.last
        if not self.trims or last is None or not args:
            return None
        hidden, last = args[0], last.to(args[0].device)
        if self._fan_out.packing is not None:
            return hidden[:, last], *args[1:]
        return hidden[torch.arange(len(hidden), device=hidden.device), last].unsqueeze(1), *args[1:]

    def _widen(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """[1, M, D] -> [1, N, D], zeros where a packed pass has not computed the MLP."""
        packing, last = self._fan_out.packing, self._fan_out.last
        if not self.trims or last is None or packing is None:
            return None
        wide = output.new_zeros(1, packing.rows.tokens, output.shape[2])
        wide[:, last.to(output.device)] = output
        return wide

    def detach(self) -> None:
        """Take them out."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def learn(self, run: Callable[[int], object]) -> None:
        """Find out which arguments do not have an entry for each input: those that do not follow when their number changes.

        An argument that short inputs do not have, such as the mask of a sliding window, goes by its size.

        Args:
            run: a pass over so many inputs, which does not fan out.
        """
        seen: dict[int, dict[Path, int]] = {}

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {place: value for place, value in enumerate(args) if place} | kwargs
            seen[count] |= {path: tensor.shape[0] for path, tensor in _tensors(rest, ())}

        handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks[self.depth :]]
        try:
            for count in (2, 3):
                seen[count] = {}
                run(count)
        finally:
            for handle in handles:
                handle.remove()
        self._fan_out.shared = frozenset(path for path, size in seen[2].items() if (size, seen[3].get(path)) != (2, 3))

    def learn_packed(self, run: Callable[[int], int]) -> None:
        """Find out which arguments of a packed pass have an entry for each token.

        Args:
            run: a packed pass over so many inputs, which does not fan out; gives its tokens.
        """
        seen: dict[int, dict[Path, int]] = {}
        tokens: list[int] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {place: value for place, value in enumerate(args) if place} | kwargs
            found = {path: tensor.shape[1] for path, tensor in _tensors(rest, ()) if tensor.dim() > 1 and len(tensor) == 1}
            seen.setdefault(len(tokens), {}).update(found)

        handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks[self.depth :]]
        try:
            tokens += [run(2)]
            tokens += [run(3)]
        finally:
            for handle in handles:
                handle.remove()
        both = {path: [size, seen[1].get(path)] for path, size in seen[0].items()}
        self._fan_out.by_token = frozenset(path for path, sizes in both.items() if sizes == tokens)

    def states(self, run: Callable[[], object]) -> Tensor:
        """What enters the first block after the trunk [B, T, D] in the pass `run`, which goes no further."""

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(_hidden(args, kwargs))

        handle = self.blocks[self.depth].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        try:
            run()
        except _Reached as reached:
            return reached.states
        finally:
            handle.remove()
        raise AssertionError("the pass did not come to the first adapted block")

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """The blocks of the trunk pass on what they are given: for a pass that starts from its states."""
        skipped = self.blocks[: self.depth]
        own = [
            block.__dict__.get("forward") for block in skipped
        ]  # of a block whose forward was wrapped before, as by accelerate
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


def _hook(fan_out: FanOut, *, first: bool) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        rows, states = fan_out.inputs, fan_out.states
        if rows is None and (states is None or not first):
            return None
        hidden = _hidden(args, kwargs)
        rest: dict[int | str, Any] = {place: value for place, value in enumerate(args) if place}
        rest |= {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if first and states is not None:
            hidden = states.to(hidden)
        if rows is not None and fan_out.packing is not None:
            source = fan_out.packing.source
            hidden = hidden[:, source.to(hidden.device)] if first else hidden
            rest = _changed(rest, _expand_packed(fan_out, source))
        elif rows is not None:
            hidden = hidden[rows.to(hidden.device)] if first else hidden
            if fan_out.count > 1:  # what has one entry for all inputs is broadcast to all rows as well
                rest = _changed(rest, _expand(fan_out, rows))
        places = tuple(rest[place] for place in range(1, len(args)))
        return (hidden, *places), {name: value for name, value in rest.items() if isinstance(name, str)}

    return before


def _tensors(value: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor with dimensions in nested tuples, lists and dicts, with its path."""
    if isinstance(value, Tensor) and value.dim():
        yield path, value
    elif isinstance(value, tuple | list | dict):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(each, (*path, key))


def _changed(value: Any, change: Callable[[Tensor, Path], Tensor], path: Path = ()) -> Any:
    """The same nested tuples, lists and dicts, with each tensor as `change` has it."""
    if isinstance(value, Tensor):
        return change(value, path)
    if isinstance(value, tuple | list):
        return type(value)(_changed(each, change, (*path, place)) for place, each in enumerate(value))
    if isinstance(value, dict):
        return {key: _changed(each, change, (*path, key)) for key, each in value.items()}
    return value


def _expand(fan_out: FanOut, rows: Tensor) -> Callable[[Tensor, Path], Tensor]:
    """The tensors that have an entry for each input, with one for each row."""

    def change(value: Tensor, path: Path) -> Tensor:
        if not value.dim() or value.shape[0] != fan_out.count or path in fan_out.shared:
            return value
        return value[rows.to(value.device)]

    return change


def _expand_packed(fan_out: FanOut, source: Tensor) -> Callable[[Tensor, Path], Tensor]:
    """The tensors that have an entry for each of the inputs' tokens, with one for each of the rows' tokens."""
    return lambda value, path: value[:, source.to(value.device)] if path in fan_out.by_token else value
