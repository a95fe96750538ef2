"""What is used of torch and transformers beyond their documented interfaces to check a base model without its weights.

As in `test_private_hooks`, there is one test for each hook, without our code in between.
"""

from __future__ import annotations

import copy

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from tests.architectures.tiny_types import tiny_config


def test_torch_fake_tensor_mode_gives_the_shapes_that_an_architecture_computes() -> None:
    """passes/exactness.py: without it `convert` would not refuse modules that cannot be served."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(tiny_config("gemma3_text"))
    seen: list[torch.Size] = []
    torch.set_default_dtype(torch.bfloat16)
    try:
        # transformers takes fake tensors for tracing, and so looks at no values of its masks.
        with FakeTensorMode(), no_init_weights(), torch.no_grad():
            base = type(skeleton)(copy.deepcopy(skeleton.config)).eval()
            base.model.layers[1].mlp.register_forward_hook(lambda _, args, output: seen.append(output.shape))
            logits = base(input_ids=torch.zeros(2, 5, dtype=torch.int64), use_cache=False).logits
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(logits, FakeTensor)
    assert seen == [(2, 5, 32)]


def test_transformers_get_decoder_and_get_text_config_of_a_multimodal_model() -> None:
    """base/targets.py: which modules a text reaches; with others a vision tower would be adapted."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("gemma3"))
        text = AutoModelForCausalLM.from_config(tiny_config("gemma3_text"))
    assert model.config.get_text_config(decoder=True) is not model.config
    assert model.get_decoder() is model.model.language_model
    assert text.config.get_text_config(decoder=True) is text.config
    assert text.get_decoder() is text.model
