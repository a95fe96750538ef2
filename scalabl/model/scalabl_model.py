"""Base model plus adapter -> logits [B, K, C] in one forward pass. Which passes to run is decided in `passes`."""

from __future__ import annotations

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
from scalabl.base.positions import UNLIMITED, unscaled_length
from scalabl.base.targets import select
from scalabl.base.transfer import kept, moved
from scalabl.config import AdapterConfig
from scalabl.errors import AdapterError
from scalabl.model.attachment import Attachment, Host
from scalabl.model.forward_pass import ForwardPass, HeadStates, Reading, RowSamples, enter
from scalabl.model.head import ChoiceHead, cut_head, own_head
from scalabl.model.layer import SubspaceLinear
from scalabl.model.packed_attention import packed
from scalabl.model.packing import Packing, packing_pays
from scalabl.model.pass_cache import PassCache
from scalabl.model.past import Past, Prefix
from scalabl.model.posterior import DEFAULT_SCHEME, FACTOR, Draws, Posterior, Scheme, draw_members, zero_draw
from scalabl.model.token_batch import TokenBatch
from scalabl.model.trunk import Trunk

HEAD_WEIGHT = "head.weight"  # an adapter's own head [C, D] among its tensors
# Places of inputs -> the samples of their rows, one input after the other, and the number of rows of each
SampleRows = Callable[[Sequence[int]], tuple[RowSamples, list[int]]]


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
        names = select(host.modules, host.head_name, config, type(base).__name__)
        try:
            with weights_of(host.head):
                rows = own_head(host.head, len(config.task.choices)) if tokens is None else cut_head(host.head, tokens)
        except ValueError as error:
            raise AdapterError(str(error)) from None
        self.own_head = rows if tokens is None else None
        self._backbone = _backbone(base) if tokens is None else None
        cut: nn.Module = rows
        self.state_width = rows.in_features  # D, of the hidden states that the head reads
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
        self.masks = False  # whether padded passes need an attention mask, as of encoders; set by `passes.exactness`
        # Prompts of more tokens than this are not in one pass with others: their length would change the others' positions.
        self._unscaled = unscaled_length(base)
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
    def positions_depend_on_pass(self) -> bool:
        """Whether a long prompt would change the positions of others in its pass, so that passes are divided by length."""
        return self._unscaled < UNLIMITED

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
        if forward_pass.width <= self._unscaled:
            return self._run(forward_pass)[0]
        parts = forward_pass.divided(self._unscaled)
        order = torch.cat([rows for rows, _ in parts]).argsort()
        of_parts = [HeadStates() for _ in parts]
        logits = [self._run(replace(part, head_states=own))[0] for (_, part), own in zip(parts, of_parts, strict=True)]
        if forward_pass.head_states is not None:
            forward_pass.head_states.rows = torch.cat([own.rows for own in of_parts if own.rows is not None])[order]
        return torch.cat(logits)[order]

    def _run(self, wanted: ForwardPass) -> tuple[Tensor, PassCache | None]:
        self.attach()
        forward_pass = self._fitted(wanted)
        cache = self._cache(forward_pass)
        trunk = nullcontext() if forward_pass.states is None else self.trunk.skipped()
        with enter(forward_pass), trunk, packed(self.base, forward_pass) as places:
            arguments = {"input_ids": forward_pass.token_ids, **_cache_arguments(cache), **self._mask(forward_pass)} | places
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

    def _mask(self, forward_pass: ForwardPass) -> dict[str, Tensor]:
        """The argument that tells the base model which tokens are padding, if it needs that."""
        return {"attention_mask": forward_pass.token_mask} if self.masks else {}

    def _cache(self, forward_pass: ForwardPass) -> PassCache | None:
        return PassCache(forward_pass, self.num_blocks) if forward_pass.past is not None or forward_pass.keeps else None

    @torch.inference_mode()
    def trunk_states(self, input_ids: Tensor, lengths: Tensor, past: Past | None = None) -> Tensor:
        """The input of the first adapted block, [B, T] right-padded with lengths [B] -> [B, T, D].

        Needs `trunk.has_states`. States of padding have no meaning.
        """
        self.attach()
        whole = ForwardPass(input_ids, lengths, past=past)
        if whole.width <= self._unscaled:
            return self._trunk_states(whole)
        parts = [(inputs, self._trunk_states(part)) for inputs, part in whole.divided(self._unscaled)]
        joined = parts[0][1].new_zeros(*input_ids.shape, parts[0][1].shape[-1])
        for inputs, states in parts:
            joined[inputs, : states.shape[1]] = states
        return joined

    def _trunk_states(self, forward_pass: ForwardPass) -> Tensor:
        arguments = _cache_arguments(self._cache(forward_pass)) | self._mask(forward_pass)
        with enter(forward_pass):
            return self.trunk.states(lambda: self.base(input_ids=forward_pass.input_ids, **arguments))

    @torch.inference_mode()
    def prefix(self, tokens: Sequence[int], draws: Draws, past: Past | None = None) -> Prefix:
        """Compute the keys and values of these tokens under each draw, in one pass; those of the past come before them.

        Raises:
            ValueError: the base model computes no keys and values in one of its blocks.
        """
        ids, lengths = moved(TokenBatch.of([tokens]).right_padded(), self.device)
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
        return [reading.logits for reading in self.readings(batch, draws, states, past)]

    def readings(
        self, batch: TokenBatch, draws: Sequence[Draws], states: Tensor | None = None, past: Past | None = None
    ) -> list[Reading]:
        """As `logits_each`, with the hidden state of each input beside its logits."""
        if len(draws) != batch.input_ids.shape[0]:
            raise ValueError(f"{len(draws)} draws were given for {batch.input_ids.shape[0]} inputs")
        return self.run_inputs(batch, lambda order: self.row_samples([draws[place] for place in order]), states, past)

    @torch.inference_mode()
    def run_inputs(
        self, batch: TokenBatch, sample_rows: SampleRows, states: Tensor | None = None, past: Past | None = None
    ) -> list[Reading]:
        """One forward pass over B inputs: logits [K_b, C] and hidden state of each.

        Args:
            sample_rows: makes the samples of the rows for the inputs in a given order.
            states, past: as of `ForwardPass`, of a batch that is right-padded.
        """
        ids, lengths = (tensor.cpu() for tensor in batch.right_padded())  # where a batch usually is
        order = torch.argsort(lengths, stable=True) if self.packs else torch.arange(len(ids))
        places = order.tolist()
        samples, counts = sample_rows(places)
        packing = None
        if self.packs and packing_pays(lengths[order], counts, self.device):
            packing = Packing.of(lengths[order], counts).to(self.device)
        ids, lengths, order = moved((ids[order], lengths[order], order), self.device)
        forward_pass = ForwardPass(ids, lengths, samples, packing, None if states is None else states[order], past)
        readings = self._read(forward_pass, counts)
        return [reading for _, reading in sorted(zip(places, readings, strict=True), key=lambda pair: pair[0])]

    def _read(self, forward_pass: ForwardPass, counts: Sequence[int]) -> list[Reading]:
        """Run a pass and split what it computes by input, of which each has this number of consecutive rows."""
        head_states = HeadStates()
        logits = self.run(replace(forward_pass, head_states=head_states))
        assert head_states.rows is not None  # every pass ends with the head
        rows = torch.split(head_states.rows.float().to(self.device), list(counts))
        parts = zip(torch.split(logits, list(counts)), rows, strict=True)
        return [Reading(of_input, states.mean(0)) for of_input, states in parts]

    def row_samples(self, draws: Sequence[Draws]) -> tuple[RowSamples, list[int]]:
        """The samples of all rows, and the number of rows of each input, for these draws; equal draws are sampled once."""
        tables: dict[Hashable, tuple[int, Draws]] = {}  # key of the draws -> (its first row in s, draws)
        first = 0
        for of_input in draws:
            if of_input.key not in tables:
                tables[of_input.key] = (first, of_input)
                first += of_input.num_samples
        epsilon, member = torch.cat([kept(table.epsilon, self.device) for _, table in tables.values()]), None
        if self.members > 1:
            (member,) = moved([torch.cat([table.member for _, table in tables.values()])], self.device)
        s = self.sample(epsilon, member)
        counts = [of_input.num_samples for of_input in draws]
        sample = torch.cat([torch.arange(of_input.num_samples) + tables[of_input.key][0] for of_input in draws])
        inputs = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        sample, inputs = moved((sample, inputs), self.device)
        fan_out = counts[0] if len(set(counts)) == 1 else 1
        spread = inputs if max(counts) > 1 else None
        return RowSamples(s, sample, fan_out, spread, tuple(tables), member), counts

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
