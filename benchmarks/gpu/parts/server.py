"""`scalabl serve` on the 1B: the time until it is ready, what it adds for one client, saturation, latency under load."""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from benchmarks.gpu.parts.shapes import random_llama, random_scalabl
from benchmarks.gpu.record import Bench
from benchmarks.load.levels import levels
from benchmarks.load.one_client import one_client
from benchmarks.load.saturation import saturation
from benchmarks.load.workload import Workload, request_bodies
from benchmarks.processes.server import Server, serving
from benchmarks.random_model import byte_tokenizer
from scalabl.files.adapter_directory import save_adapter

NUM_SAMPLES, ROUNDS, PATIENCE = 8, 3, 20
ONE_BY_ONE, AT_ONCE, SECONDS_OF_LOAD = 60, 400, 8.0
SHARES = [80]  # offered load, in percent of saturation


def measure(bench: Bench) -> None:
    """Write the model, start the server and ask it."""
    bench.attempt("the model's files", lambda: _write(bench))
    bench.attempt("the server", lambda: _serve(bench))


def _write(bench: Bench) -> None:
    base = random_llama("1B", bench.device)
    base.save_pretrained(bench.scratch / "base")
    byte_tokenizer().save_pretrained(bench.scratch / "base")
    model = random_scalabl(base)
    save_adapter(bench.scratch / "adapter", model.config, dict(model.adapter_parameters()))
    model.detach()
    del base, model
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _serve(bench: Bench) -> None:
    workload = Workload(str(bench.scratch / "base"), bench.scratch / "adapter", 2 if bench.dry else NUM_SAMPLES)
    settings: dict[str, object] = {"max_input_tokens": 512, "device": bench.device}
    if bench.dry:
        settings |= {"warmup": "quick", "threads": 1, "max_input_tokens": 256, "dtype": "bfloat16"}
    data = bench.scratch / "data"
    data.mkdir()
    began = time.monotonic()
    with serving(data, seconds=bench.left(), **workload.settings | settings) as server:
        bench.put("ready_seconds", time.monotonic() - began)
        bench.put("log", _said(server))
        bench.put("info", json.loads(server.get("/info")))
        _ask(bench, server)


def _ask(bench: Bench, server: Server) -> None:
    one_by_one, at_once = (2, 3) if bench.dry else (ONE_BY_ONE, AT_ONCE)
    client = one_client(server, request_bodies(one_by_one), print)
    bench.put("client", client)
    full = saturation(server, request_bodies(at_once), None, 1 if bench.dry else ROUNDS, print)
    bench.put("saturation", full)
    rate = full["server"]["median"]
    count = 4 if bench.dry else max(50, min(4000, int(rate * SECONDS_OF_LOAD)))
    deadline = max(1.0, PATIENCE * client["wall"]["median"])
    rows = levels(server, request_bodies(count), rate, SHARES, deadline, print)
    bench.put("levels", [{name: value for name, value in row.items() if name != "latencies"} for row in rows])


def _said(server: Server) -> list[str]:
    """What the log says about the start."""
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in server.log.read_text(encoding="utf-8").splitlines() if line.startswith("{")
    ]
    return [str(line.get("message", line.get("event", ""))) for line in lines][:40]
