"""The content of `/info`: base model, adapters, defaults and limits of a loaded engine."""

from __future__ import annotations

from scalabl import __version__
from scalabl_server.engines.interface import Engine, Served
from scalabl_server.schemas.server import AdapterInfo, Info, ModelInfo


def describe(engine: Engine) -> Info:
    """`/info` of a loaded engine."""
    settings = engine.settings
    default = engine.adapters.get(engine.default_adapter)
    return Info(
        version=__version__,
        model=ModelInfo(
            name=engine.model_name,
            architecture=engine.architecture,
            dtype=engine.dtype,
            device=engine.device,
            quantization=engine.settings.quantization,
        ),
        adapter=describe_adapter(default) if default is not None else None,
        adapters=[describe_adapter(served) for _, served in sorted(engine.adapters.items())],
        defaults={"num_samples": settings.num_samples, "seed": settings.seed, "draw_scheme": settings.draw_scheme},
        limits={
            "max_samples": settings.max_samples,
            "max_inputs": settings.max_inputs,
            "max_input_tokens": engine.max_input_tokens,
            "max_batch_tokens": settings.max_batch_tokens,
            "target_batch_tokens": engine.target_batch_tokens,
            "max_body_bytes": settings.max_body_bytes,
            "max_input_chars": settings.longest_text(engine.max_input_tokens),
            "max_choices": settings.max_choices,
            "max_choice_chars": settings.max_choice_chars,
            "max_sample_values": settings.max_sample_values,
            "max_priority": settings.max_priority,
            "max_queue": settings.max_queue,
            "max_queue_tokens": settings.queue_tokens,
            "request_timeout": settings.request_timeout,
        },
    )


def describe_adapter(served: Served) -> AdapterInfo:
    """The entry of one adapter in `/info`."""
    config = served.config
    return AdapterInfo(
        name=served.name,
        r=config.r,
        lora_alpha=config.lora_alpha,
        members=config.members,
        adapted_layers=served.adapted_layers,
        stochastic_parameters=served.stochastic_parameters,
        additional_parameters=served.additional_parameters,
        posterior_scale=config.posterior_scale,
        relative_spread=served.relative_spread,
        temperature=config.temperature,
        task=config.task.kind,
        choices=list(config.task.choices),
        calibration=config.calibration,
        novelty=config.novelty if served.novelty is not None else None,
        quantization_change=served.quantization_change,
    )
