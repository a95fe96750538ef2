"""How a base model's positions depend on the length of a prompt, from its configuration."""

from __future__ import annotations

from transformers import PreTrainedModel

UNLIMITED = 2**62


def unscaled_length(base: PreTrainedModel) -> int:
    """The most tokens of a prompt up to which no rotary embedding scales positions by the longest prompt of a pass.

    Above it, `longrope` takes other frequencies for all prompts of the pass, and `dynamic` scales them by the longest one.
    """
    config = base.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    ropes = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    scaled = [rope for rope in ropes if rope.get("rope_type") in ("dynamic", "longrope")]
    return min(
        (int(rope.get("original_max_position_embeddings") or config.max_position_embeddings) for rope in scaled),
        default=UNLIMITED,
    )
