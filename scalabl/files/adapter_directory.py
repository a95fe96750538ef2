"""Adapter directories: validated reading, writing, and loading onto a base model. Nothing is ever unpickled.

Other projects' formats are in `bayesadapt`, `peft_import` and `peft_export`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from scalabl.config import AdapterConfig
from scalabl.errors import AdapterError
from scalabl.files.atomic import write_file
from scalabl.model.posterior import FACTOR
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def read_config(folder: Path) -> AdapterConfig:
    """Read the `adapter_config.json` of an adapter directory.

    Raises:
        AdapterError: the file is missing, is not JSON or has an invalid field; the message names the field.
    """
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{folder} has no {CONFIG_FILE}; an adapter folder needs it and {WEIGHTS_FILE}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read as JSON: {error}") from None
    if isinstance(raw, dict) and raw.get("peft_type", "SCALABL") != "SCALABL":
        raise AdapterError(f"{path}: peft_type is {raw['peft_type']!r}; a ScalaBL adapter has 'SCALABL'")
    try:
        return AdapterConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise AdapterError(f"{path}: {field}: {first['msg'].removeprefix('Value error, ')}") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of `adapter_model.safetensors`, in float32.

    Raises:
        AdapterError: the file is missing or is not in the safetensors format.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterError(f"{folder} has no {WEIGHTS_FILE}; an adapter folder needs it and {CONFIG_FILE}")
    try:
        # Not `load_file`: safetensors 0.8 leaks the name of every tensor, which adds up when adapters are often loaded.
        return {name: tensor.float() for name, tensor in load(path.read_bytes()).items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is not a safetensors file: {error}") from None


def fingerprint_of_files(folder: Path) -> str:
    """SHA-256 of an adapter directory's two files, to see whether another process has changed them.

    Raises:
        AdapterError: one of them cannot be read.
    """
    try:
        parts = [hashlib.sha256((folder / name).read_bytes()).digest() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    except OSError as error:
        raise AdapterError(f"{error.filename} cannot be read: {error.strerror}") from None
    return hashlib.sha256(b"".join(parts)).hexdigest()


def load_weights(model: ScalaBLModel, weights: Mapping[str, Tensor]) -> None:
    """Copy an adapter's tensors into a model. If any tensor is invalid, nothing is copied.

    Raises:
        AdapterError: a tensor is missing, has an unknown name, a wrong shape or values that are not finite, or a sigma is
            not above 0.
    """
    parameters = model.adapter_parameters()
    unknown = sorted(weights.keys() - parameters.keys())
    if FACTOR in unknown:
        raise AdapterError(f"tensor {FACTOR!r} needs the covariance 'full', and {CONFIG_FILE} has 'diagonal'")
    if unknown:
        module = unknown[0].rpartition(".")[0]
        raise AdapterError(
            f"tensor {unknown[0]!r} cannot be loaded: {module!r} is not a module of the base model that {CONFIG_FILE} adapts"
        )
    for name, parameter in parameters.items():
        if name not in weights:
            raise AdapterError(f"tensor {name!r} is missing from {WEIGHTS_FILE}")
        tensor = weights[name]
        if tensor.shape != parameter.shape:
            raise AdapterError(
                f"tensor {name!r} has shape {list(tensor.shape)}; the base model and {CONFIG_FILE} require "
                f"{list(parameter.shape)}"
            )
        if name.endswith(".s_log_std"):
            sigma = tensor.exp()
            if bool((sigma <= 0).any()):
                raise AdapterError(f"tensor {name!r} has a sigma that is not above 0 (ln sigma is {float(tensor.min())})")
            if not bool(torch.isfinite(sigma).all()):
                raise AdapterError(f"tensor {name!r} has a sigma that is not finite (ln sigma is {float(tensor.max())})")
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"tensor {name!r} has values that are not finite")
    if FACTOR in parameters:
        _check_factor(weights[FACTOR], torch.cat([weights[f"{name}.s_log_std"] for name in model.adapted], -1))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def _check_factor(factor: Tensor, log_std: Tensor) -> None:
    """Check that F [..., P, P] is a lower triangle whose F F^T has the variances exp(log_std)^2, log_std [..., P].

    Raises:
        AdapterError: it is not.
    """
    if bool(factor.triu(1).any()):
        raise AdapterError(f"tensor {FACTOR!r} has values above its diagonal; it must be lower triangular")
    if not bool((factor.diagonal(dim1=-2, dim2=-1) > 0).all()):
        raise AdapterError(f"tensor {FACTOR!r} has a diagonal that is not above 0")
    sigma = factor.double().square().sum(-1).sqrt()
    if not torch.allclose(sigma, log_std.double().exp(), rtol=1e-3):
        raise AdapterError(f"tensor {FACTOR!r} has other standard deviations than the s_log_std of the modules")


def check_effect(model: ScalaBLModel) -> None:
    """Check that each member of an adapter changes the base model's logits, on a short test prompt under two draws.

    Raises:
        AdapterError: the logits equal the base model's to the last bit, or they are not finite.
    """
    vocabulary = model.base.get_input_embeddings().weight.shape[0]
    probe = [(7 * i + 3) % vocabulary for i in range(8)]
    # Antithetic draws work for any number of scalars; Sobol draws do not.
    draws = model.draws(2 * model.members, scheme="antithetic")
    adapted = model.logits(TokenBatch.of([probe]), draws)[0]
    if not bool(torch.isfinite(adapted).all()):
        raise AdapterError(
            "the adapter gives logits that are not finite; its values are too large for the base model's dtype"
        )
    # As many rows as in the pass above: a matrix product of another shape may round differently.
    plain = model.base_logits(TokenBatch.of([probe] * draws.num_samples))
    for member in range(model.members):
        own = draws.member == member
        if torch.equal(adapted[own], plain[own]):
            name = "the adapter" if model.members == 1 else f"member {member + 1} of the adapter's {model.members}"
            raise AdapterError(f"{name} changes no logit of the base model; was it saved before training or scaled to 0?")


def read_adapter(base: PreTrainedModel, folder: Path) -> ScalaBLModel:
    """Read an adapter directory for a base model, without attaching the adapter or checking its effect.

    The base model is neither run nor changed, so another thread may use it meanwhile. The adapter's matrices get the base
    model's dtype; mu and sigma stay in float32.

    Raises:
        AdapterError: the adapter is malformed or does not fit the base model.
    """
    config, weights = read_config(folder), read_weights(folder)
    # Checked before any tensor of rank r is allocated, because a wrong r or number of members may be huge.
    expected = [config.r] if config.members == 1 else [config.members, config.r]
    for name, tensor in weights.items():
        if name.endswith(".s_mean") and list(tensor.shape) != expected:
            raise AdapterError(
                f"tensor {name!r} has shape {list(tensor.shape)}; the base model and {CONFIG_FILE} require {expected}"
            )
    if not any(name.endswith(".s_mean") for name in weights):
        raise AdapterError(f"{folder / WEIGHTS_FILE} has no tensor named <module>.s_mean; it is not a ScalaBL adapter")
    model = ScalaBLModel(base, config, attach=False)
    load_weights(model, weights)
    for layer in model.adapted.values():
        layer.lora_A.data = layer.lora_A.data.to(base.dtype)
        layer.lora_B.data = layer.lora_B.data.to(base.dtype)
        layer.requires_grad_(False)
    if model.own_head is not None:
        model.own_head.requires_grad_(False)
    return model


def load_adapter(base: PreTrainedModel, folder: Path) -> ScalaBLModel:
    """Read an adapter directory and attach the adapter to a base model, ready to serve.

    Raises:
        AdapterError: the adapter is malformed, does not fit the base model, or has no effect.
    """
    return _made_ready(read_adapter(base, folder))


def adapter_from(base: PreTrainedModel, config: AdapterConfig, weights: Mapping[str, Tensor]) -> ScalaBLModel:
    """As `load_adapter`, from a configuration and tensors instead of a folder; the tensors stay in float32.

    Raises:
        AdapterError: as `load_adapter`.
    """
    model = ScalaBLModel(base, config)
    load_weights(model, weights)
    for layer in model.adapted.values():
        layer.requires_grad_(False)
    return _made_ready(model)


def _made_ready(model: ScalaBLModel) -> ScalaBLModel:
    model.eval()
    find_shared_work(model)
    check_effect(model)
    return model


def save_adapter(folder: Path, config: AdapterConfig, weights: Mapping[str, Tensor]) -> None:
    """Write an adapter directory. No file is ever seen half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in weights.items()}
    # Not `save_file`: only the owner could read its file, and a server may run as another user.
    write_file(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    save_config(folder, config)


def save_config(folder: Path, config: AdapterConfig) -> None:
    """Write the `adapter_config.json` of an adapter directory, in its lowest format version. It is never half-written."""
    config = config.model_copy(update={"format_version": config.lowest_format_version})
    text = json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
    write_file(folder / CONFIG_FILE, text.encode())
