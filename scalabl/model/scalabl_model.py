"""Base model plus adapter -> logits [B, K, C] in one forward pass. Files are `adapter_io`'s, prompts are `prompt`'s."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from scalabl_kernels import runs_fused
from scalabl_kernels.launch import WARM_UP_ROWS
from torch import Tensor, nn
from transformers import PreTrainedModel

from scalabl.base.placement import device_of, weights_of
from scalabl.config import AdapterConfig
from scalabl.errors import AdapterError
from scalabl.model.attachment import Attachment, Host
from scalabl.model.layer import ChoiceHead, RowSamples, SampleContext, SubspaceLinear, cut_head, is_adaptable
from scalabl.model.packing import Packing, packed
from scalabl.model.past import Past, arguments
from scalabl.model.posterior import DEFAULT_SCHEME, Draws, Scheme, draw, zero_draw
from scalabl.model.trunk import FanOut, Trunk
from scalabl.passes.probes import find_shared_work

GRADIENT_TOKENS = 2048  # rows x padded length that a graph for derivatives holds at once


@dataclass(frozen=True)
class TokenBatch:
    """B tokenised inputs, padded on either side.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T], 1 where there is a token; each row has at least one.
    """

    input_ids: Tensor
    attention_mask: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> TokenBatch:
        """Right-padded batch of B token lists."""
        if not sequences or not all(sequences):
            raise ValueError("a batch needs at least one sequence, and each sequence at least one token")
        lengths = [len(sequence) for sequence in sequences]
        width = max(lengths)
        ids = torch.tensor([[*sequence, *[0] * (width - len(sequence))] for sequence in sequences])
        mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
        return cls(ids, mask.long())

    def right_padded(self) -> tuple[Tensor, Tensor]:
        """(ids [B, T'], lengths [B]): each row's tokens moved to the left end, T' the longest row."""
        mask = self.attention_mask.bool()
        lengths = mask.sum(dim=1)
        if int(lengths.min()) < 1:
            raise ValueError("attention_mask has a row without any token")
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        return self.input_ids.gather(1, order)[:, : int(lengths.max())], lengths


def _layer_index(name: str) -> int | None:
    match = re.search(r"\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def _select(host: Host, config: AdapterConfig, architecture: str) -> list[str]:
    """Names of the modules to adapt, in the base model's own order; an unmatched target is an error."""
    layers = config.layers_to_transform
    chosen, matched, seen_layers = [], set(), set()
    for name, module in host.modules.items():
        targets = [t for t in config.target_modules if name == t or name.endswith("." + t)]
        if not targets or not is_adaptable(module):
            continue
        index = _layer_index(name)
        if name != host.head_name and layers is not None:
            if index not in layers:
                continue
            seen_layers.add(index)
        matched.update(targets)
        chosen.append(name)
    missing = [t for t in config.target_modules if t not in matched]
    if missing:
        raise AdapterError(f"target module {missing[0]!r} matches no linear layer of the base model {architecture}")
    absent = [i for i in layers or () if i not in seen_layers]
    if absent and chosen != [host.head_name]:
        raise AdapterError(f"layers_to_transform names layer {absent[0]}, in which the base model has no target module")
    return chosen


class ScalaBLModel(nn.Module):
    """A transformers causal language model whose target modules carry a ScalaBL adapter.

    The base model is frozen and changed in place while the adapter is attached: its target modules become `SubspaceLinear`
    and its head is cut to the task's choice tokens, so that the vocabulary is never multiplied out. Embeddings tied to the
    head keep their own weights. Any number of adapters share one base model, whose weights exist once; a pass attaches the
    adapter that it needs.

    Not re-entrant and not locked: one thread at a time runs, attaches or detaches the adapters of one base model.

    Args:
        attach: False leaves the base as it is until the first pass, so that another thread may be running it meanwhile.

    Raises:
        AdapterError: the configuration does not fit the base model; the message names the module, layer or token.
    """

    def __init__(self, base: PreTrainedModel, config: AdapterConfig, *, attach: bool = True) -> None:
        super().__init__()
        if config.task.choice_tokens is None:
            raise AdapterError("task.choice_tokens is not set; resolve it with the tokenizer (scalabl.prompt.Prompter)")
        self.config = config
        self.base = base
        self._context = SampleContext()
        self.adapted: dict[str, SubspaceLinear] = {}

        host = Host.of(base)
        if host.head is None or host.head_name is None:
            raise AdapterError(f"{type(base).__name__} has no output head; a causal language model is needed")
        names = _select(host, config, type(base).__name__)
        try:
            with weights_of(host.head):
                cut: nn.Module = cut_head(host.head, config.task.choice_tokens)
        except ValueError as error:
            raise AdapterError(str(error)) from None
        for name in names:
            inner = cut if name == host.head_name else host.modules[name]
            start = len(self.adapted) * config.r
            layer = SubspaceLinear(inner, config.r, config.scaling, slice(start, start + config.r), self._context)
            self.adapted[name] = layer
            if name == host.head_name:
                cut = layer
        self._head = ChoiceHead(cut)
        self._fan_out = FanOut()
        self.packs = False  # whether `logits` runs without padding; see `find_shared_work`
        self.trunk = Trunk(host, [name for name in names if name != host.head_name], self._fan_out)
        self._attachment = Attachment(host, {**self.adapted, host.head_name: self._head}, self.trunk)
        if attach:
            self.attach()

    def attach(self) -> None:
        """Put this adapter into the base model, in the place of whichever was there."""
        self._attachment.attach()

    def detach(self) -> None:
        """Take this adapter out of the base model, if it is in; its own modules are back then."""
        self._attachment.detach()

    @property
    def num_stochastic_parameters(self) -> int:
        """P: the scalars that are drawn, R per adapted layer."""
        return self.config.r * len(self.adapted)

    @property
    def num_choices(self) -> int:
        return len(self.config.task.choices)

    @property
    def device(self) -> torch.device:
        """Where a pass begins, and what the method itself computes."""
        return device_of(self.base.get_input_embeddings())

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Everything trainable, named as in the adapter file: `<module>.lora_A` and so on."""
        return {
            f"{name}.{kind}": getattr(layer, kind)
            for name, layer in self.adapted.items()
            for kind in ("lora_A", "lora_B", "s_mean", "s_log_std")
        }

    def reset_adapter(self, seed: int, std_init: float = 0.05) -> None:
        """A fresh, untrained adapter: the paper's initialisation, B = 0."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.adapted.values():
            layer.reset_parameters(generator, std_init)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """(mean [P], log_std [P]) of q(s) over all adapted layers, without `posterior_scale`; differentiable."""
        layers, device = list(self.adapted.values()), self.device
        return (
            torch.cat([layer.s_mean.to(device) for layer in layers]),
            torch.cat([layer.s_log_std.to(device) for layer in layers]),
        )

    def draws(self, num_samples: int, seed: int = 0, scheme: Scheme = DEFAULT_SCHEME) -> Draws:
        """K draws for this adapter: a pure function of (seed, num_samples, scheme, number of stochastic parameters)."""
        return draw(seed, num_samples, self.num_stochastic_parameters, scheme)

    def mean_draw(self) -> Draws:
        """One draw with every scalar at its posterior mean."""
        return zero_draw(self.num_stochastic_parameters)

    def sample(self, epsilon: Tensor) -> Tensor:
        """s = mu + tau * sigma * epsilon: [N, P] -> [N, P]; differentiable in mu and sigma."""
        mean, log_std = self.posterior()
        return mean + self.config.posterior_scale * log_std.exp() * epsilon.to(mean.device)

    def find_shared_work(self) -> None:
        """Find out what need not be computed for every sample, or at all; see `probing.find_shared_work`."""
        find_shared_work(self)

    def warm_up(self) -> None:
        """Run the adapted layers at every launch shape that serving can meet, so that no request waits for a compiler."""
        if not runs_fused(self.device):
            return
        for rows in WARM_UP_ROWS:
            self.logits(TokenBatch.of([[0]] * rows), self.mean_draw())

    def run_rows(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        rows: RowSamples | None,
        states: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """One forward pass over B right-padded inputs, M rows: logits [M, C] float32 at each row's last position.

        Causal attention never looks right, so right padding needs no mask and cannot reach an answer. With `rows.packing`
        the padding is left out; inputs then stand in order of their lengths.
        `rows` None runs the base model without its adapter. The context keeps `rows` afterwards, since gradient
        checkpointing runs layers again in the backward pass.

        Args:
            input_ids: [B, T] int64. lengths: [B] int64, 1 <= lengths <= T.
            states: [B, T, D], what `trunk_states` gave for the same inputs; the trunk then does not run.
            past: the tokens before these, the same ones for all inputs.
        """
        self.attach()
        self._context.rows = rows
        inputs, packing = (None, None) if rows is None else (rows.inputs, rows.packing)
        if inputs is not None and not self.trunk.verified:
            assert packing is None  # needs the trunk to be verified
            input_ids, lengths, inputs = input_ids[inputs], lengths[inputs], None
        self._fan_out.inputs, self._fan_out.count, self._fan_out.packing = inputs, input_ids.shape[0], packing
        in_blocks = bool(self.trunk.blocks)  # else rows fan out at the head
        spread = inputs is not None and in_blocks
        self._head.inputs, self._head.packed = None if in_blocks else inputs, packing is not None
        if packing is None:
            last = (lengths[inputs] if spread else lengths) - 1
        else:
            last = (packing.rows if spread else packing.inputs).last
            input_ids, states = packing.pack(input_ids), None if states is None else packing.pack(states)
        self._fan_out.states, self._head.last, self._fan_out.last = states, last, last
        with ExitStack() as form:
            if states is not None:
                form.enter_context(self.trunk.skipped())
            if past is not None:
                past.begin(None if rows is None else rows.sample, packed=packing is not None)
            places = {} if packing is None else form.enter_context(packed(self.base, packing, past))
            output = self.base(input_ids=input_ids, **arguments(past), **places)
        logits: Tensor = output.logits[:, 0].float()
        return logits.to(self.device)

    @torch.inference_mode()
    def trunk_states(self, input_ids: Tensor, past: Past | None = None) -> Tensor:
        """[B, T] -> [B, T, D], what enters the first adapted block; needs `trunk.verified` and a block that is adapted."""
        self.attach()
        self._context.rows, self._fan_out.inputs, self._fan_out.states, self._fan_out.packing = None, None, None, None
        if past is not None:
            past.begin(None, packed=False)
        return self.trunk.states(lambda: self.base(input_ids=input_ids, **arguments(past)))

    @torch.inference_mode()
    def logits(self, batch: TokenBatch, draws: Draws, states: Tensor | None = None) -> Tensor:
        """Logits of B inputs under K posterior samples, in one forward pass over B * K rows.

        Args:
            states: as for `run_rows`, of a batch that is right-padded.

        Returns:
            [B, K, C] float32, before the temperature.
        """
        return torch.stack(self.logits_each(batch, [draws] * batch.input_ids.shape[0], states))

    @torch.inference_mode()
    def logits_each(
        self, batch: TokenBatch, draws: Sequence[Draws], states: Tensor | None = None, past: Past | None = None
    ) -> list[Tensor]:
        """As `logits`, with draws (and so K) of its own for each input: B tensors [K_b, C], still one forward pass.

        Args:
            past: as for `run_rows`, of a batch that is right-padded.
        """
        ids, lengths = (tensor.to(self.device) for tensor in batch.right_padded())
        if len(draws) != ids.shape[0]:
            raise ValueError(f"{len(draws)} draws were given for {ids.shape[0]} inputs")
        if not self.packs:
            return self._logits_each(ids, lengths, draws, states, past)
        order = torch.argsort(lengths, stable=True)
        places = order.tolist()
        states = None if states is None else states[order]
        found = self._logits_each(ids[order], lengths[order], [draws[place] for place in places], states, past)
        return [logits for _, logits in sorted(zip(places, found, strict=True), key=lambda pair: pair[0])]

    def _logits_each(
        self, ids: Tensor, lengths: Tensor, draws: Sequence[Draws], states: Tensor | None, past: Past | None
    ) -> list[Tensor]:
        """As `logits_each`, of inputs in the order in which they run."""
        tables: dict[int, tuple[int, Draws]] = {}  # id of the draws -> (first row in s, draws)
        first = 0
        for each in draws:
            if id(each) not in tables:
                tables[id(each)] = (first, each)
                first += each.num_samples
        s = self.sample(torch.cat([each.epsilon for _, each in tables.values()]))
        counts = [each.num_samples for each in draws]
        sample = torch.cat([torch.arange(each.num_samples) + tables[id(each)][0] for each in draws])
        expand = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(self.device)
        try:
            fan_out = counts[0] if len(set(counts)) == 1 else 1
            packing = None
            if past is not None:
                past.order = [each for _, each in tables.values()]
            if self.packs and (past is None or not past.keeps):  # what is kept has a row for each sample
                packing = Packing.of(lengths, counts)
            rows = RowSamples(s, sample.to(self.device), fan_out, expand if max(counts) > 1 else None, packing)
            return list(torch.split(self.run_rows(ids, lengths, rows, states, past), counts))
        finally:
            self._context.rows = None

    @torch.enable_grad()
    def jacobian(self, batch: TokenBatch, active: Tensor, *, max_tokens: int = GRADIENT_TOKENS) -> tuple[Tensor, Tensor]:
        """Logits of B inputs at the posterior mean, and their derivatives by the subspace scalars there.

        Every row has scalars of its own, so that a reverse pass of the sum of each row's own choice gives all of J. What
        that pass needs of every layer would not fit for all rows: it is held for some of them at a time.

        Args:
            active: [B, C] bool, the choices whose derivatives are wanted, at least one for each input.
            max_tokens: rows x padded length in one graph; a single row may exceed it.

        Returns:
            ([B, C], [B, C, P]), zero where not active.
        """
        ids, lengths = (tensor.to(self.device) for tensor in batch.right_padded())
        inputs, choices = active.to(self.device).nonzero(as_tuple=True)  # [M]
        mean = self.posterior()[0].detach()
        logits: list[Tensor] = []
        gradients: list[Tensor] = []
        size = max(1, max_tokens // ids.shape[1])
        try:
            for inputs_m, choices_m in zip(torch.split(inputs, size), torch.split(choices, size), strict=True):
                rows = torch.arange(len(inputs_m), device=self.device)
                s = mean.expand(len(rows), -1).clone().requires_grad_()
                first, end = int(inputs_m[0]), int(inputs_m[-1]) + 1
                samples = RowSamples(s, rows, inputs=inputs_m - first)
                z = self.run_rows(ids[first:end], lengths[first:end], samples)  # [m, C]
                gradients += torch.autograd.grad(z[rows, choices_m].sum(), s)
                logits.append(z.detach())
        finally:
            self._context.rows = None
        jacobian = mean.new_zeros(*active.shape, len(mean))
        jacobian[inputs, choices] = torch.cat(gradients)
        firsts = torch.searchsorted(inputs, torch.arange(len(active), device=self.device))
        return torch.cat(logits)[firsts], jacobian

    @torch.inference_mode()
    def base_logits(self, batch: TokenBatch) -> Tensor:
        """[B, C]: the base model's logits over the choice tokens, without the adapter."""
        ids, lengths = (tensor.to(self.device) for tensor in batch.right_padded())
        return self.run_rows(ids, lengths, None)
