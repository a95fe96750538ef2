"""PEFT on the real base model gives what we give: for exported samples of the example, and for a classifier of its own."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from scalabl_server.cli.main import app
from typer.testing import CliRunner

from scalabl.base.pretrained import load_pretrained
from scalabl.files.adapter_directory import load_adapter, read_config
from scalabl.model.token_batch import TokenBatch
from scalabl.prompt import Prompter
from tests.scalabl.files.peft_reference import trained_classifier

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "intent_router"


def test_peft_with_exported_samples_of_the_example_gives_our_logits(tmp_path: Path) -> None:
    folder = os.environ.get("SCALABL_EXAMPLE_BASE")
    if folder is None:
        pytest.skip("SCALABL_EXAMPLE_BASE is not set; run `make integration`, which fetches the example's base model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

    adapter, samples = EXAMPLE / "adapter", 4
    arguments = [
        "--adapter",
        str(adapter),
        "--model",
        folder,
        "--num-samples",
        str(samples),
        "--output",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, ["export", "peft", *arguments])
    assert result.stdout == f"wrote {tmp_path / 'out'}: sample-0 … sample-3\n"

    # In float64: what float32 rounds off in 30 layers, each way in its own order, can be 1e-4 of a logit.
    pretrained = load_pretrained(folder, device="cpu")
    pretrained.model.to(torch.float64)
    prompter = Prompter(read_config(adapter).task, pretrained.tokenizer)
    queries = (EXAMPLE / "queries.txt").read_text(encoding="utf-8").splitlines()[:4]
    sequences = [prompter.encode(query) for query in queries]
    ours = load_adapter(pretrained.model, adapter)
    expected = ours.logits(TokenBatch.of(sequences), ours.draws(samples))  # [B, K, C]

    other = load_pretrained(folder, device="cpu").model
    theirs = PeftModel.from_pretrained(other.to(torch.float64), str(tmp_path / "out" / "sample-0")).eval()
    for k in range(1, samples):
        theirs.load_adapter(str(tmp_path / "out" / f"sample-{k}"), adapter_name=f"sample-{k}")
    for k in range(samples):
        theirs.to(torch.float64).set_adapter("default" if k == 0 else f"sample-{k}")
        with torch.inference_mode():
            for row, ids in enumerate(sequences):
                logits = theirs(input_ids=torch.tensor([ids])).logits[0, -1, list(prompter.choice_tokens)]
                # Logits reach 17 here; norms, and s A in the file, are rounded to float32.
                assert (logits - expected[row, k]).abs().max() <= 1e-5 * expected.abs().max(), (queries[row], k)
                difference = logits.softmax(-1) - expected[row, k].softmax(-1)
                assert difference.abs().max() <= 1e-5, (queries[row], k)


def test_a_classifier_that_peft_trained_answers_as_in_peft(tmp_path: Path) -> None:
    folder = os.environ.get("SCALABL_EXAMPLE_BASE")
    if folder is None:
        pytest.skip("SCALABL_EXAMPLE_BASE is not set; run `make integration`, which fetches the example's base model")
    queries = (EXAMPLE / "queries.txt").read_text(encoding="utf-8").splitlines()[:6]
    pretrained = load_pretrained(folder, device="cpu", dtype="float32")
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [28, 29]}
    classes = [index % 3 for index in range(len(queries))]
    alone, padded = trained_classifier(
        Path(folder), tmp_path / "lora", pretrained.tokenizer, queries, classes, steps=3, **settings
    )
    labels = [part for name in ("a, b", "c", "d") for part in ("--label", name)]
    arguments = ["--peft", tmp_path / "lora", "--model", folder, "--output", tmp_path / "new", *labels]
    result = CliRunner().invoke(app, ["convert", "peft", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    ours = load_adapter(pretrained.model, tmp_path / "new")
    prompter = Prompter(ours.config.task, pretrained.tokenizer)
    sequences = [prompter.encode(query) for query in queries]
    together = ours.logits(TokenBatch.of(sequences), ours.mean_draw())[:, 0].softmax(-1)
    single = torch.cat([ours.logits(TokenBatch.of([ids]), ours.mean_draw())[:, 0] for ids in sequences]).softmax(-1)
    assert (padded.max(0).values - padded.min(0).values).max() > 0.05  # it tells the queries apart
    assert (together - padded).abs().max() <= 1e-5
    assert (single - alone).abs().max() <= 1e-5
