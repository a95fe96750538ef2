"""Base model plus adapter -> logits [B, K, C] in one forward pass. Which passes to run is decided in `passes`."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from scalabl_kernels import runs_fused
from scalabl_kernels.launch import WARM_UP_ROWS
from torch import Tensor, nn
from transformers import PreTrainedModel

from scalabl.base.placement import device_of, weights_of
from scalabl.config import AdapterConfig
from scalabl.errors import AdapterError
from scalabl.model.attachment import Attachment, Host
from scalabl.model.forward_pass import ForwardPass, RowSamples, enter
from scalabl.model.head import ChoiceHead, cut_head, own_head
from scalabl.model.layer import SubspaceLinear, is_adaptable
from scalabl.model.packed_attention import packed
from scalabl.model.packing import Packing
from scalabl.model.pass_cache import PassCache
from scalabl.model.past import Past, Prefix
from scalabl.model.posterior import DEFAULT_SCHEME, FACTOR, Draws, Posterior, Scheme, draw_members, zero_draw
from scalabl.model.token_batch import TokenBatch
from scalabl.model.trunk import Trunk

HEAD_WEIGHT = "head.weight"  # an adapter's own head [C, D] among its tensors
# Places of inputs -> the samples of their rows, one input after the other, and the number of rows of each
SampleRows = Callable[[Sequence[int]], tuple[RowSamples, list[int]]]


def _layer_index(name: str) -> int | None:
    match = re.search(r"\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def _check_layers(host: Host, layers: Sequence[int] | None) -> None:
    """Raise AdapterError for an index that is not that of a layer of the base model."""
    indices = {index for name in host.modules if (index := _layer_index(name)) is not None}
    absent = [index for index in layers or () if index not in indices]
    if absent and indices:
        raise AdapterError(
            f"layers_to_transform names layer {absent[0]}, but the base model's layers are {min(indices)} to {max(indices)}"
        )


def _select(host: Host, config: AdapterConfig, architecture: str) -> list[str]:
    """Names of the modules to adapt, in the base model's order. Raises AdapterError for a target without a module."""
    layers = config.layers_to_transform
    _check_layers(host, layers)
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

    The base model is frozen, and changed in place while the adapter is attached: its target modules become
    `SubspaceLinear`, and its head is reduced to the task's choice tokens, so that logits of the whole vocabulary are never
    computed. Any number of adapters share one base model, whose weights exist once; a pass attaches the adapter that it
    needs.

    There are no locks: only one thread at a time may run, attach or detach the adapters of one base model.

    Args:
        attach: False leaves the base model unchanged until the first pass, so that another thread may run it meanwhile.

    Raises:
        AdapterError: the configuration does not fit the base model; the message names the module, layer or token.
    """

    def __init__(self, base: PreTrainedModel, config: AdapterConfig, *, attach: bool = True) -> None:
        super().__init__()
        tokens = config.task.choice_tokens
        if tokens is None and config.task.head == "vocabulary":
            raise AdapterError("task.choice_tokens is not set; resolve it with the tokenizer (scalabl.prompt.Prompter)")
        self.config = config
        self.base = base
        self.adapted: dict[str, SubspaceLinear] = {}

        host = Host.of(base)
        if host.head is None or host.head_name is None:
            raise AdapterError(f"{type(base).__name__} has no output head; a causal language model is needed")
        names = _select(host, config, type(base).__name__)
        try:
            with weights_of(host.head):
                rows = own_head(host.head, len(config.task.choices)) if tokens is None else cut_head(host.head, tokens)
        except ValueError as error:
            raise AdapterError(str(error)) from None
        self.own_head = rows if tokens is None else None
        self._backbone = _backbone(base) if tokens is None else None
        cut: nn.Module = rows
        for name in names:
            inner = cut if name == host.head_name else host.modules[name]
            start = len(self.adapted) * config.r
            layer = SubspaceLinear(inner, config.r, config.scaling, slice(start, start + config.r), config.members)
            self.adapted[name] = layer
            if name == host.head_name:
                cut = layer
        self.covariance_factor: nn.Parameter | None = None  # [P, P], or [M, P, P] with more than one member
        if config.covariance == "full":
            shape = [*([config.members] if config.members > 1 else []), *2 * [self.num_stochastic_parameters]]
            self.covariance_factor = nn.Parameter(torch.empty(shape, device=self.device))
        self.packs = False  # whether `logits` runs packed passes, without padding; set by `passes.probes`
        self.trunk = Trunk(host, [name for name in names if name != host.head_name])
        self.head, self.head_name = ChoiceHead(cut), host.head_name
        self._attachment = Attachment(host, {**self.adapted, host.head_name: self.head}, self.trunk)
        if attach:
            self.attach()

    def attach(self) -> None:
        """Attach this adapter to the base model, instead of any other adapter."""
        self._attachment.attach()

    def detach(self) -> None:
        """Detach this adapter, if it is attached; the base model then has its own modules again."""
        self._attachment.detach()

    @property
    def num_stochastic_parameters(self) -> int:
        """P: the number of scalars that are drawn for a sample, R for each adapted layer."""
        return self.config.r * len(self.adapted)

    @property
    def members(self) -> int:
        """M: the number of members of the posterior, each with scalars and matrices of its own."""
        return self.config.members

    @property
    def num_choices(self) -> int:
        return len(self.config.task.choices)

    @property
    def device(self) -> torch.device:
        """The device on which a pass begins and ends."""
        return device_of(self.base.get_input_embeddings())

    @property
    def num_blocks(self) -> int:
        """The number of decoder blocks of the base model."""
        return int(self.base.config.get_text_config(decoder=True).num_hidden_layers)

    @property
    def shared_blocks(self) -> int:
        """The number of first decoder blocks that run once for each input: no draw changes their keys and values."""
        if not self.trunk.verified:
            return 0
        return self.trunk.depth if self.trunk.blocks else self.num_blocks

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """All trainable parameters, named as in the adapter file: `<module>.lora_A` and so on; the own head's first."""
        parameters: dict[str, nn.Parameter] = {}
        if self.own_head is not None:
            parameters[HEAD_WEIGHT] = self.own_head.weight  # type: ignore[assignment]  # a parameter
        for name, layer in self.adapted.items():
            parameters |= {f"{name}.{kind}": getattr(layer, kind) for kind in ("lora_A", "lora_B", "s_mean", "s_log_std")}
        if self.covariance_factor is not None:
            parameters[FACTOR] = self.covariance_factor
        return parameters

    def reset_adapter(self, seed: int, std_init: float = 0.05) -> None:
        """Reset to an untrained adapter with the paper's initialisation, in which B = 0.

        A head of its own starts as in transformers' models for sequence classification: N(0, `initializer_range`^2).
        """
        generator = torch.Generator().manual_seed(seed)
        for layer in self.adapted.values():
            layer.reset_parameters(generator, std_init)
        if self.own_head is not None:
            spread = getattr(self.base.config.get_text_config(), "initializer_range", 0.02)
            initial = torch.empty(self.own_head.weight.shape).normal_(0.0, spread, generator=generator)
            self.own_head.weight.data.copy_(initial)

    def posterior(self) -> Posterior:
        """q(s) over all adapted layers; differentiable in mu and ln sigma."""
        layers, device = list(self.adapted.values()), self.device
        mean = torch.cat([layer.s_mean.to(device) for layer in layers], dim=-1)
        log_std = torch.cat([layer.s_log_std.to(device) for layer in layers], dim=-1)
        shape, factor = (self.members, mean.shape[-1]), None
        if self.covariance_factor is not None:
            factor = self.covariance_factor.to(device).view(*shape, -1)
        return Posterior(mean.view(shape), log_std.view(shape), self.config.posterior_scale, factor)

    def draws(self, num_samples: int, seed: int = 0, scheme: Scheme = DEFAULT_SCHEME) -> Draws:
        """K draws for this adapter: a pure function of (seed, num_samples, scheme, number of scalars and of members).

        Raises:
            ValueError: as for `draw_members`.
        """
        return draw_members(seed, num_samples, self.num_stochastic_parameters, self.members, scheme)

    def mean_draw(self) -> Draws:
        """One draw for each member, with every scalar at its mean in that member."""
        return zero_draw(self.num_stochastic_parameters, self.members)

    def sample(self, epsilon: Tensor, member: Tensor | None = None) -> Tensor:
        """s = mu + F epsilon: [N, P] -> [N, P]; differentiable in mu and sigma.

        Args:
            member: [N] int64, the member of each row; needed if there are several.
        """
        return self.posterior().sample(epsilon, member)

    def warm_up(self) -> None:
        """Run the kernel at every launch shape that serving uses, so that no request waits for its compilation."""
        if not runs_fused(self.device):
            return
        for rows in WARM_UP_ROWS:
            self.logits(TokenBatch.of([[0]] * rows), self.mean_draw())

    def run(self, forward_pass: ForwardPass) -> Tensor:
        """One forward pass: logits [M, C] float32 at each row's last position, before the temperature.

        Raises:
            RuntimeError: another pass is running on this thread.
        """
        return self._run(forward_pass)[0]

    def _run(self, wanted: ForwardPass) -> tuple[Tensor, PassCache | None]:
        self.attach()
        forward_pass = self._fitted(wanted)
        cache = self._cache(forward_pass)
        trunk = nullcontext() if forward_pass.states is None else self.trunk.skipped()
        with enter(forward_pass), trunk, packed(self.base, forward_pass) as places:
            arguments = {"input_ids": forward_pass.token_ids, **_cache_arguments(cache), **places}
            if self._backbone is None:
                logits: Tensor = self.base(**arguments).logits
            else:  # what some architectures do to the logits of their vocabulary (scales, caps) is not for other heads
                logits = self.head(self._backbone(**arguments).last_hidden_state)
        return logits[:, 0].float().to(self.device), cache

    def _fitted(self, wanted: ForwardPass) -> ForwardPass:
        """The pass in the form that this base model supports: if rows cannot fan out, inputs are copied before the pass."""
        samples, inputs = wanted.samples, wanted.inputs
        if samples is None or inputs is None or self.trunk.verified:
            return replace(wanted, spreads_in_blocks=bool(self.trunk.blocks))
        assert wanted.packing is None  # packed passes need a verified trunk
        ids, lengths = wanted.input_ids[inputs], wanted.lengths[inputs]
        return replace(wanted, input_ids=ids, lengths=lengths, samples=replace(samples, inputs=None))

    def _cache(self, forward_pass: ForwardPass) -> PassCache | None:
        return PassCache(forward_pass, self.num_blocks) if forward_pass.past is not None or forward_pass.keeps else None

    @torch.inference_mode()
    def trunk_states(self, input_ids: Tensor, past: Past | None = None) -> Tensor:
        """The input of the first adapted block, [B, T] -> [B, T, D]; needs `trunk.has_states`."""
        self.attach()
        lengths = torch.full(input_ids.shape[:1], input_ids.shape[1], device=input_ids.device)
        forward_pass = ForwardPass(input_ids, lengths, past=past)
        cache = self._cache(forward_pass)
        with enter(forward_pass):
            return self.trunk.states(lambda: self.base(input_ids=input_ids, **_cache_arguments(cache)))

    @torch.inference_mode()
    def prefix(self, tokens: Sequence[int], draws: Draws, past: Past | None = None) -> Prefix:
        """Compute the keys and values of these tokens under each draw, in one pass; those of the past come before them.

        Raises:
            ValueError: the base model computes no keys and values in one of its blocks.
        """
        ids, lengths = (tensor.to(self.device) for tensor in TokenBatch.of([tokens]).right_padded())
        samples, _ = self.row_samples([draws])
        cache = self._run(ForwardPass(ids, lengths, samples, past=past, keeps=True))[1]
        assert cache is not None  # because `keeps` is set
        return cache.prefix(self.shared_blocks)

    @torch.inference_mode()
    def logits(self, batch: TokenBatch, draws: Draws, states: Tensor | None = None) -> Tensor:
        """Logits of B inputs under K posterior samples, in one forward pass over B * K rows.

        Args:
            states: as of `ForwardPass`, of a batch that is right-padded.

        Returns:
            [B, K, C] float32, before the temperature.
        """
        return torch.stack(self.logits_each(batch, [draws] * batch.input_ids.shape[0], states))

    @torch.inference_mode()
    def logits_each(
        self, batch: TokenBatch, draws: Sequence[Draws], states: Tensor | None = None, past: Past | None = None
    ) -> list[Tensor]:
        """As `logits`, but each input has its own draws (and so its own K): B tensors [K_b, C], still in one forward pass.

        Args:
            past: as of `ForwardPass`, of a batch that is right-padded.
        """
        if len(draws) != batch.input_ids.shape[0]:
            raise ValueError(f"{len(draws)} draws were given for {batch.input_ids.shape[0]} inputs")
        return self.run_inputs(batch, lambda order: self.row_samples([draws[place] for place in order]), states, past)

    @torch.inference_mode()
    def run_inputs(
        self, batch: TokenBatch, sample_rows: SampleRows, states: Tensor | None = None, past: Past | None = None
    ) -> list[Tensor]:
        """One forward pass over B inputs: the logits [K_b, C] of each.

        Args:
            sample_rows: makes the samples of the rows for the inputs in a given order.
            states, past: as of `ForwardPass`, of a batch that is right-padded.
        """
        ids, lengths = (tensor.to(self.device) for tensor in batch.right_padded())
        if not self.packs:
            samples, counts = sample_rows(range(len(ids)))
            return list(torch.split(self.run(ForwardPass(ids, lengths, samples, None, states, past)), counts))
        order = torch.argsort(lengths, stable=True)
        places = order.tolist()
        samples, counts = sample_rows(places)
        forward_pass = ForwardPass(
            ids[order],
            lengths[order],
            samples,
            Packing.of(lengths[order], counts),
            None if states is None else states[order],
            past,
        )
        logits = torch.split(self.run(forward_pass), counts)
        return [logits for _, logits in sorted(zip(places, logits, strict=True), key=lambda pair: pair[0])]

    def row_samples(self, draws: Sequence[Draws]) -> tuple[RowSamples, list[int]]:
        """The samples of all rows, and the number of rows of each input, for these draws; equal draws are sampled once."""
        tables: dict[Hashable, tuple[int, Draws]] = {}  # key of the draws -> (its first row in s, draws)
        first = 0
        for of_input in draws:
            if of_input.key not in tables:
                tables[of_input.key] = (first, of_input)
                first += of_input.num_samples
        epsilon, member = torch.cat([table.epsilon for _, table in tables.values()]), None
        if self.members > 1:
            member = torch.cat([table.member for _, table in tables.values()]).to(self.device)
        s = self.sample(epsilon, member)
        counts = [of_input.num_samples for of_input in draws]
        sample = torch.cat([torch.arange(of_input.num_samples) + tables[of_input.key][0] for of_input in draws])
        inputs = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(self.device)
        fan_out = counts[0] if len(set(counts)) == 1 else 1
        spread = inputs if max(counts) > 1 else None
        return RowSamples(s, sample.to(self.device), fan_out, spread, tuple(tables), member), counts

    @torch.inference_mode()
    def base_logits(self, batch: TokenBatch) -> Tensor:
        """[B, C]: the base model's logits over the choice tokens, without the adapter."""
        ids, lengths = (tensor.to(self.device) for tensor in batch.right_padded())
        return self.run(ForwardPass(ids, lengths))


def _backbone(base: PreTrainedModel) -> nn.Module:
    """The base model without its head: what transformers' models for sequence classification run.

    Raises:
        AdapterError: the base model's class does not have this part.
    """
    backbone: nn.Module = base.base_model
    if backbone is base:
        raise AdapterError(f"{type(base).__name__} has no part without its head; task.head 'own' needs it")
    return backbone


def _cache_arguments(cache: PassCache | None) -> dict[str, Any]:
    """The arguments that give a transformers model this cache, or none."""
    return {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
