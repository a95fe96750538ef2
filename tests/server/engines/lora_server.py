"""What the vLLM engine sees of a vLLM server, over a real socket: LoRA folders of a tiny model behind the same routes.

A real vLLM takes a minute to start, and a virtual environment of its own: `tests/integration/serving/test_vllm.py` has it.
Here are the faults that one cannot be brought to on demand.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from tests import tiny
from tests.integration.support.process import free_port

BASE = "the-base"


@dataclass
class LoraServer:
    """One server.

    Attributes:
        leaves_out: kinds of modules whose LoRA it passes over, as some engines do with a tied head.
        names_tokens: whether it knows `logprob_token_ids`.
        loads: whether it has the route that loads LoRAs.
        gate: answers wait for it.
        calls: LoRA and number of prompts of each call.
    """

    port: int = field(default_factory=free_port)
    seed: int = 0
    leaves_out: frozenset[str] = frozenset()
    names_tokens: bool = True
    loads: bool = True
    answers_as: str | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    calls: list[tuple[str, int]] = field(default_factory=list)
    models: dict[str, PreTrainedModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gate.set()
        self.models[BASE] = tiny.base_model(seed=self.seed)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def load(self, name: str, folder: Path) -> None:
        """W + scaling B A for each module of a LoRA directory."""
        model = copy.deepcopy(self.models[BASE])
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # no longer tied
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        for key, down in tensors.items():
            module, found, _ = key.removeprefix("base_model.model.").partition(".lora_A.")
            if found and module.rpartition(".")[2] not in self.leaves_out:
                up = tensors[key.replace("lora_A", "lora_B")]
                model.get_submodule(module).weight += settings["lora_alpha"] / settings["r"] * up @ down
        self.models[name] = model

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to `/v1/completions`, one token after each prompt."""
        choices = []
        for index, prompt in enumerate(body["prompt"]):
            logits = self.models[body["model"]](input_ids=torch.tensor([prompt])).logits[0, -1]
            logprobs = torch.log_softmax(logits.float(), -1)
            wanted = body.get("logprob_token_ids") if self.names_tokens else None
            tokens = wanted or logprobs.topk(body["logprobs"]).indices.tolist()
            top = {f"token_id:{token}": float(logprobs[token]) for token in tokens}
            choices.append({"index": index, "text": "", "logprobs": {"top_logprobs": [top]}})
        return {"model": self.answers_as or body["model"], "choices": choices}

    def app(self) -> FastAPI:
        app = FastAPI()

        def error(status: int, message: str) -> JSONResponse:
            return JSONResponse({"error": {"message": message, "code": status}}, status)

        @app.get("/v1/models")
        def models() -> dict[str, Any]:
            cards = [{"id": name, "parent": None if name == BASE else BASE, "max_model_len": 64} for name in self.models]
            return {"object": "list", "data": cards}

        if self.loads:

            @app.post("/v1/load_lora_adapter")
            async def load(request: Request) -> Any:
                body = await request.json()
                if body["lora_name"] in self.models:
                    return error(400, f"The lora adapter '{body['lora_name']}' has already been loaded.")
                if not Path(body["lora_path"]).is_dir():
                    return error(404, "No adapter found")
                self.load(body["lora_name"], Path(body["lora_path"]))
                return JSONResponse("Success")

            @app.post("/v1/unload_lora_adapter")
            async def unload(request: Request) -> Any:
                del self.models[(await request.json())["lora_name"]]
                return JSONResponse("Success")

        @app.post("/v1/completions")
        def completions(body: dict[str, Any]) -> Any:
            self.calls.append((body["model"], len(body["prompt"])))
            self.gate.wait(30)
            if body["model"] not in self.models:
                return error(404, f"The model `{body['model']}` does not exist.")
            return self.complete(body)

        return app

    @contextmanager
    def up(self) -> Iterator[LoraServer]:
        """Listening; when it ends, connections break as those of a killed process do."""
        server = uvicorn.Server(
            uvicorn.Config(self.app(), port=self.port, log_level="critical", timeout_graceful_shutdown=0, lifespan="off")
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.005)
        try:
            yield self
        finally:
            server.should_exit = server.force_exit = True
            self.gate.set()
            thread.join(30)
