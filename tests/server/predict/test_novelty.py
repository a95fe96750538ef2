"""Novelty as served: the same numbers by every method and in every company, and what follows from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from scalabl_server.engines.load import load_engine
from scalabl_server.predict.decisions import decisions
from scalabl_server.schemas.prediction import InputNovelty

from scalabl.config import AdapterConfig
from scalabl.errors import AdapterError
from scalabl.files.adapter_directory import read_config
from scalabl.files.novelty_file import read_novelty
from scalabl.model.token_batch import TokenBatch
from scalabl.prompt import Prompter
from scalabl.uncertainty.novelty import NoveltyReference
from scalabl.uncertainty.predictive import predictive
from tests import tiny
from tests.server.conftest import serving, settings_for

TEXTS = ["xxxx", "hello there", "a", "what is this about, and why is it so long"]
LEVEL = 0.3


@pytest.fixture(scope="module")
def novel_folders(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `folders`, where `colours` has a novelty reference."""
    work = tmp_path_factory.mktemp("novel")
    shutil.copytree(folders, work / "served")
    tiny.add_novelty(work / "served" / "colours", level=LEVEL)
    return work / "served"


@pytest.fixture(scope="module")
def client(novel_folders: Path) -> Iterator[TestClient]:
    with serving(settings_for(novel_folders, num_samples=8, adapters=f"letters={novel_folders / 'letters'}")) as made:
        yield made


@pytest.fixture(scope="module")
def reference(novel_folders: Path) -> NoveltyReference:
    found = read_novelty(novel_folders / "colours", read_config(novel_folders / "colours"), 32)
    assert found is not None
    return found


def ask(client: TestClient, texts: list[str], **fields: Any) -> list[dict[str, Any]]:
    response = client.post("/predict", json={"inputs": texts, **fields})
    assert response.status_code == 200, response.text
    return list(response.json()["predictions"])


def offline(folders: Path, reference: NoveltyReference, text: str, num_samples: int | None) -> float:
    """The score of one text alone, by a padded pass without any shortcut; None samples: at the posterior mean."""
    model = tiny.adapted()
    ids = Prompter(model.config.task, tiny.tokenizer()).encode(text)
    draws = model.mean_draw() if num_samples is None else model.draws(num_samples, 0)
    (reading,) = model.readings(TokenBatch.of([ids]), [draws])
    return float(reference.scores(reading.state.unsqueeze(0)))


@pytest.mark.parametrize(
    ("fields", "num_samples"),
    [
        ({}, 8),
        ({"num_samples": 3}, 3),
        ({"method": "linearized"}, None),
        ({"method": "control_variate"}, 8),
        ({"num_samples": "auto", "target": "probabilities", "tolerance": 1e-9}, 64),
    ],
    ids=str,
)
def test_every_method_has_the_novelty_of_its_own_samples(
    client: TestClient, novel_folders: Path, reference: NoveltyReference, fields: dict[str, Any], num_samples: int | None
) -> None:
    for _ in range(2):  # the second time with the prefix cache filled
        for text, prediction in zip(TEXTS, ask(client, TEXTS, **fields), strict=True):
            expected = offline(novel_folders, reference, text, num_samples)
            assert prediction["novelty"]["score"] == pytest.approx(expected, abs=2e-4)
            assert 0 < prediction["novelty"]["p_value"] <= 1


def test_neighbours_in_the_batch_change_nothing(client: TestClient) -> None:
    together = [prediction["novelty"]["score"] for prediction in ask(client, TEXTS)]
    alone = [ask(client, [text])[0]["novelty"]["score"] for text in TEXTS]
    assert together == pytest.approx(alone, abs=1e-4)


def test_p_values_are_those_of_the_scores(client: TestClient, reference: NoveltyReference) -> None:
    for prediction in ask(client, TEXTS):
        score = torch.tensor([prediction["novelty"]["score"]], dtype=torch.float64)
        p = reference.p_values(score)
        assert p is not None
        assert prediction["novelty"]["p_value"] == float(p)


def test_what_is_novel_abstains_and_says_why(client: TestClient) -> None:
    for prediction in ask(client, TEXTS):
        novel = prediction["novelty"]["p_value"] <= LEVEL
        assert prediction["abstain"] is novel, "without a threshold for uncertainty only novelty decides"
        assert prediction["abstain_reason"] == (["novel"] if novel else [])


def test_an_adapter_without_a_reference_answers_as_before(client: TestClient) -> None:
    (prediction,) = ask(client, ["x"], adapter="letters", choices=["p", "q"])
    assert (prediction["novelty"], prediction["abstain"], prediction["abstain_reason"]) == (None, None, [])


def test_int8_keeps_the_base_model_recognisable(novel_folders: Path) -> None:
    with serving(settings_for(novel_folders, num_samples=8, quantization="int8")) as client:
        assert all(prediction["novelty"]["p_value"] is not None for prediction in ask(client, TEXTS))


def test_info_says_how_the_reference_was_made(client: TestClient) -> None:
    info = client.get("/info").json()
    (colours,) = [adapter for adapter in info["adapters"] if adapter["name"] == "colours"]
    (letters,) = [adapter for adapter in info["adapters"] if adapter["name"] == "letters"]
    assert colours["novelty"]["calibration"]["level"] == LEVEL
    assert letters["novelty"] is None


def test_a_stored_prediction_has_it(client: TestClient) -> None:
    (prediction,) = ask(client, ["hello there"])
    stored = client.get(f"/predictions/{prediction['id']}").json()["prediction"]
    assert stored["novelty"] == prediction["novelty"]
    assert stored["abstain_reason"] == prediction["abstain_reason"]


def test_it_is_an_output_of_the_open_inference_protocol(client: TestClient) -> None:
    tensor = {"name": "text", "shape": [2], "datatype": "BYTES", "data": TEXTS[:2]}
    outputs = {
        output["name"]: output["data"]
        for output in client.post("/v2/models/colours/infer", json={"inputs": [tensor]}).json()["outputs"]
    }
    predictions = ask(client, TEXTS[:2])
    assert outputs["novelty_p_value"] == [prediction["novelty"]["p_value"] for prediction in predictions]
    assert outputs["novelty_score"] == pytest.approx([prediction["novelty"]["score"] for prediction in predictions])
    assert outputs["abstain_reason"] == [",".join(prediction["abstain_reason"]) for prediction in predictions]
    named = [output["name"] for output in client.get("/v2/models/colours").json()["outputs"]]
    assert named == list(outputs)


def test_the_protocol_has_no_novelty_for_an_adapter_without_it(client: TestClient) -> None:
    assert "novelty_score" not in [output["name"] for output in client.get("/v2/models/letters").json()["outputs"]]
    inputs = [
        {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["x"]},
        {"name": "choices", "shape": [2], "datatype": "BYTES", "data": ["p", "q"]},
    ]
    body = {"inputs": inputs, "outputs": [{"name": "novelty_score"}]}
    refusal = client.post("/v2/models/letters/infer", json=body)
    assert refusal.status_code == 422
    assert "no novelty p-values" in refusal.json()["error"]


def _metric(client: TestClient, name: str) -> float:
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return float(line.rpartition(" ")[2])


def test_metrics_count_p_values_novel_inputs_and_the_martingale(
    serve: Callable[..., TestClient], novel_folders: Path
) -> None:
    client = serve(novel_folders / "colours")
    assert _metric(client, 'scalabl_novelty_level{adapter="colours"}') == LEVEL
    assert _metric(client, 'scalabl_novelty_martingale_log10{adapter="colours"}') == 0
    novel = sum(prediction["abstain"] for prediction in ask(client, TEXTS * 8))
    assert _metric(client, 'scalabl_novelty_p_value_count{adapter="colours"}') == 8 * len(TEXTS)
    assert _metric(client, 'scalabl_novel_inputs_total{adapter="colours"}') == novel
    assert _metric(client, 'scalabl_novelty_martingale_log10{adapter="colours"}') != 0


def test_a_broken_reference_is_refused_by_name(novel_folders: Path, tmp_path: Path) -> None:
    shutil.copytree(novel_folders / "colours", tmp_path / "root" / "broken")
    with serving(settings_for(novel_folders, enable_adapter_loading=True, adapter_root=tmp_path / "root")) as client:
        body = {"lora_name": "broken", "lora_path": "broken"}
        file = tmp_path / "root" / "broken" / "novelty.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-100])
        refusal = client.post("/v1/load_lora_adapter", json=body)
        assert refusal.status_code == 422, refusal.text
        assert "novelty.safetensors" in refusal.json()["detail"]
        file.write_bytes(content)
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "broken"}).status_code == 200
        assert 'adapter="broken"' not in "".join(
            line for line in client.get("/metrics").text.splitlines() if line.startswith("scalabl_novelty_level")
        )


def test_the_limit_on_an_adapters_size_counts_it(novel_folders: Path, tmp_path: Path) -> None:
    shutil.copytree(novel_folders / "colours", tmp_path / "root" / "large")
    files = {file.name: file.stat().st_size for file in (tmp_path / "root" / "large").iterdir()}
    limit = sum(files.values()) - 1
    assert files["novelty.safetensors"] > 1
    settings = settings_for(
        novel_folders, enable_adapter_loading=True, adapter_root=tmp_path / "root", max_adapter_bytes=limit
    )
    with serving(settings) as client:
        refusal = client.post("/v1/load_lora_adapter", json={"lora_name": "large", "lora_path": "large"})
        assert f"have {limit + 1} bytes and the limit is {limit}" in refusal.json()["detail"]


def test_another_base_model_is_refused_at_the_start(novel_folders: Path, tmp_path: Path) -> None:
    tiny.base_model(seed=3).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match=r"novelty\.safetensors was made with another base model"):
        load_engine(settings_for(novel_folders, model=str(tmp_path / "base")))


def _config(novelty: bool, rule: bool) -> AdapterConfig:
    config = json.loads(tiny.config_for().model_dump_json())
    if novelty:
        data = {"name": "rows.jsonl", "sha256": "0", "rows": 99}
        config |= {"format_version": 2, "novelty": {
            "data": data, "base_model_name_or_path": "b", "weights_sha256": "0", "width": 4, "components": 2, "rows": 3,
            "neighbours": 5,
            "calibration": {"data": data, "level": 0.05, "num_samples": 8, "seed": 0, "draw_scheme": "sobol"},
        }}  # fmt: skip
    levels = {"lac": {"0.9": 0.5}, "aps": {"0.9": 0.5}}
    abstain = {
        "score": "entropy", "threshold": 0.3, "target_risk": 0.05, "confidence": 0.9, "achieved_risk": 0.0,
        "risk_bound": 0.01, "coverage": 0.9,
    }  # fmt: skip
    config["calibration"] = {
        "data": {"name": "rows.jsonl", "sha256": "0", "rows": 99, "fit_rows": 49, "threshold_rows": 50},
        "num_samples": 8, "seed": 0, "draw_scheme": "sobol", "method": "lac", "thresholds": levels,
        "abstain": abstain if rule else None, "quantiles": {}, "before": {"nll": 1, "ece": 0}, "after": {"nll": 1, "ece": 0},
    }  # fmt: skip
    return AdapterConfig.model_validate(config)


SURE, UNSURE = torch.tensor([[[9.0, 0.0, 0.0]] * 2]), torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    ("logits", "p_value", "has_novelty", "has_rule", "level", "abstain", "reasons"),
    [
        (SURE, 0.5, True, True, "0.9", False, []),
        (UNSURE, 0.5, True, True, "0.9", True, ["uncertain"]),
        (SURE, 0.01, True, True, "0.9", True, ["novel"]),
        (UNSURE, 0.05, True, True, "0.9", True, ["uncertain", "novel"]),
        (SURE, None, False, True, "0.9", False, []),
        (SURE, None, False, False, "0.9", None, []),
        (SURE, 0.5, True, False, "0.9", False, []),
        (SURE, 0.5, True, True, None, None, []),  # the calibration is for other settings: uncertainty is not known
        (SURE, 0.01, True, True, None, True, ["novel"]),
        (SURE, None, False, True, None, None, []),
    ],
)
def test_abstention_is_for_uncertain_or_novel_inputs(
    logits: torch.Tensor,
    p_value: float | None,
    has_novelty: bool,
    has_rule: bool,
    level: str | None,
    abstain: bool | None,
    reasons: list[str],
) -> None:
    outcome = predictive(logits, 1.0, "sobol").of_input(0)
    novelty = InputNovelty(p_value=p_value, score=0.0) if has_novelty else None
    decided = decisions(outcome, ("a", "b", "c"), _config(has_novelty, has_rule), level, novelty)
    assert (decided["abstain"], decided["abstain_reason"]) == (abstain, reasons)
    assert (decided["prediction_set"] is None) is (level is None)
