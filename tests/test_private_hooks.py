"""What this project uses of others beyond their documented interfaces: one test for each hook, without our code in between.

A test that fails after an upgrade says what changed, and its docstring which of our modules that breaks. Where a hook is
the reason for an upper bound in pyproject.toml, the reason stands beside the bound.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field, ValidationError, field_validator
from sqlalchemy import Column, Integer, MetaData, String, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from starlette.exceptions import HTTPException
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.trainer import TRAINER_STATE_NAME
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from tests import tiny

ROOT = Path(__file__).resolve().parents[1]


def test_the_modules_that_use_a_hook_are_where_these_tests_say() -> None:
    named = re.findall(r"\b\w+/[\w/]+\.py\b", Path(__file__).read_text(encoding="utf-8"))
    named += re.findall(r"#.*?(\w+/[\w/]+\.py)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = ("kernels", "scalabl", "server/scalabl_server", "")
    assert len(named) > 10
    assert [name for name in named if not any((ROOT / folder / name).is_file() for folder in folders)] == []


async def answer_ok(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def test_uvicorn_server_handle_exit_captured_signals_and_on_tick() -> None:
    """web/draining.py: without them SIGTERM would not drain, or a drained server would not end."""
    calls: list[str] = []

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            calls.append("handle_exit")
            self._captured_signals.append(sig)

        async def on_tick(self, counter: int) -> bool:
            assert await super().on_tick(counter) is False  # the signal alone does not end it
            if calls:
                return True
            signal.raise_signal(signal.SIGTERM)
            return False

    server = Server(uvicorn.Config(answer_ok, port=0, log_config=None, lifespan="off"))
    assert server._captured_signals == []
    assert server.config.timeout_graceful_shutdown is None
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append("raised again"))
    try:
        asyncio.run(server.serve())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == ["handle_exit", "raised again"]


def test_uvicorn_server_capture_signals() -> None:
    """listen.py: the admin port's server leaves signals to the main one by overriding it."""
    handlers: list[Any] = []

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def on_tick(self, counter: int) -> bool:
            handlers.append(signal.getsignal(signal.SIGTERM))
            return True

    before = signal.getsignal(signal.SIGTERM)
    asyncio.run(Server(uvicorn.Config(answer_ok, port=0, log_config=None, lifespan="off")).serve())
    assert handlers == [before]


class RecordingProtocol(H11Protocol):
    """What web/protocol.py overrides, with what it relies on at each call."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn declares it
        self.calls: list[str] = []
        super().connection_made(transport)
        assert self.transport is transport
        assert callable(self.flow.resume_reading)
        assert self.cycle is None
        assert self.loop is asyncio.get_running_loop()
        assert isinstance(self.conn, h11.Connection)
        assert (self.conn.our_state, self.conn.their_state) == (h11.IDLE, h11.IDLE)

    def handle_events(self) -> None:
        self.calls.append("handle_events")
        super().handle_events()

    def on_response_complete(self) -> None:
        self.calls.append("on_response_complete")
        assert self.cycle.response_complete is True
        assert self.cycle.disconnected is False
        assert isinstance(self.cycle.message_event, asyncio.Event)
        assert self.cycle.transport is self.transport  # whose `close` ends the connection
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self.calls.append("send_400_response")
        error = sys.exception()
        assert isinstance(error, h11.RemoteProtocolError)
        assert error.error_status_hint == 400
        super().send_400_response(msg)


def test_uvicorn_h11protocol_internals() -> None:
    """web/protocol.py: conn, flow, cycle, transport, loop, server_state, and the methods that it overrides.

    Without them a connection has no limits of time, and a malformed request gets no problem document.
    """
    protocols: list[RecordingProtocol] = []

    async def exchange() -> list[bytes]:
        state = ServerState()
        assert state.default_headers == []
        config = uvicorn.Config(answer_ok, log_config=None, lifespan="off")

        def connect() -> RecordingProtocol:
            protocols.append(RecordingProtocol(config=config, server_state=state, app_state={}))
            assert protocols[-1].server_state is state
            return protocols[-1]

        server = await asyncio.get_running_loop().create_server(connect, "127.0.0.1", 0)
        answers = []
        async with server:
            for request in (b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", b"nonsense\r\n\r\n"):
                reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
                writer.write(request)
                answers.append(await asyncio.wait_for(reader.read(), 30))
                writer.close()
                await writer.wait_closed()
        return answers

    answers = asyncio.run(exchange())
    assert [answer.partition(b"\r\n")[0] for answer in answers] == [b"HTTP/1.1 200 OK", b"HTTP/1.1 400 Bad Request"]
    assert [protocol.calls for protocol in protocols] == [
        ["handle_events", "on_response_complete"],
        ["handle_events", "send_400_response"],
    ]


def test_fastapi_reads_a_body_by_request_json_and_chains_its_error() -> None:
    """web/guard.py reads JSON strictly by its own `Request.json`, and web/errors.py finds the refusal in `__cause__`."""

    class RefusalError(Exception):
        pass

    class StrictRequest(Request):
        async def json(self) -> Any:
            raise RefusalError

    class Route(APIRoute):
        def get_route_handler(self) -> Any:
            handle = super().get_route_handler()
            assert self.body_field is not None

            async def handler(request: Request) -> Response:
                response: Response = await handle(StrictRequest(request.scope, request.receive))
                return response

            return handler

    app, causes, routes = FastAPI(), [], []
    app.router.route_class = Route

    @app.post("/items/{name}")
    async def create(name: str, body: dict[str, int]) -> None: ...

    @app.exception_handler(HTTPException)
    async def handle(request: Request, error: HTTPException) -> Response:
        causes.append(type(error.__cause__))
        routes.append(request.scope["route"].path)  # web/observation.py labels metrics with it
        return Response(status_code=error.status_code)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/items/one", "headers": headers, "query_string": b""}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Any) -> None: ...

    asyncio.run(app(scope, receive, send))
    assert causes == [RefusalError]
    assert routes == ["/items/{name}"]


def test_pydantic_names_the_branches_of_a_union_in_loc() -> None:
    """web/errors.py leaves these names out of its messages, and cli/options.py the words before a validator's own."""

    class Body(BaseModel):
        inputs: str | list[str]
        count: int | None = None

        @field_validator("count")
        @classmethod
        def _check(cls, count: int | None) -> int | None:
            raise ValueError("own words")

    with pytest.raises(ValidationError) as raised:
        Body.model_validate({"inputs": 1, "count": 1})
    assert [error["loc"] for error in raised.value.errors()] == [("inputs", "str"), ("inputs", "list[str]"), ("count",)]
    assert raised.value.errors()[2]["msg"] == "Value error, own words"

    class Limited(BaseModel):
        count: Any = Field(default=None)

    with pytest.raises(ValidationError) as raised:
        Limited.model_validate([], from_attributes=True)
    assert raised.value.errors()[0]["type"] == "model_attributes_type"


@pytest.mark.parametrize("dialect", [sqlite.dialect(), PGDialect_psycopg()], ids=["sqlite", "postgresql"])
def test_sqlalchemy_names_the_parameters_of_many_rows_m0_m1(dialect: Any) -> None:
    """outcomes/prepared.py gives the driver values under these names; with others no prediction could be recorded."""
    table = Table("table", MetaData(), Column("key", String), Column("value", Integer))
    insert = postgresql.insert if dialect.name == "postgresql" else sqlite.insert
    compiled = insert(table).values([{"key": None, "value": None}] * 2).inline().compile(dialect=dialect)
    names = ["key_m0", "value_m0", "key_m1", "value_m1"]
    assert list(compiled.params) == names
    if dialect.name == "sqlite":
        assert compiled.positional
        assert list(compiled.positiontup) == names
    else:
        assert not compiled.positional
        assert all(f"%({name})s" in str(compiled) for name in names)


def test_transformers_config_attn_implementation_chooses_the_registered_attention_and_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """model/packed_attention.py runs a packed pass under such a name; without it every pass on a CPU is padded."""
    seen: list[tuple[int, Any, tuple[int, ...]]] = []
    masks: list[tuple[int, int, int]] = []

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        seen.append((int(module.layer_idx), attention_mask, tuple(query.shape)))  # type: ignore[arg-type]  # its number
        mask = sdpa_mask(batch_size=1, q_length=query.shape[2], kv_length=key.shape[2], **mask_arguments)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0], None

    mask_arguments: dict[str, Any] = {}

    def mask(*, batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None, **rest: Any) -> str:
        masks.append((batch_size, q_length, kv_length))
        mask_arguments.update(rest)
        return "the mask"

    AttentionInterface.register("hook", attention)
    AttentionMaskInterface.register("hook", mask)
    model, ids = tiny.base_model(), torch.tensor([[5, 6, 7]])
    assert model.config._attn_implementation == "sdpa"
    ones = torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=ones, use_cache=False).logits
    monkeypatch.setattr(model.config, "_attn_implementation", "hook")
    logits = model(input_ids=ids, attention_mask=ones, use_cache=False).logits
    assert seen == [(0, "the mask", (1, 4, 3, 8)), (1, "the mask", (1, 4, 3, 8))]
    assert masks == [(1, 3, 3)]
    assert torch.allclose(logits, expected, atol=1e-5)


def test_transformers_cache_asks_a_layer_for_these_methods_only() -> None:
    """model/pass_cache.py has each of them and no other; without them no prefix is reused."""
    assert CacheLayerMixin.__abstractmethods__ == {
        "lazy_initialization", "update", "get_seq_length", "get_mask_sizes", "get_max_length",
    }  # fmt: skip
    calls: set[str] = set()

    class Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers does not type this module
        is_sliding = False

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            raise AssertionError("nothing is to be made beforehand")

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            calls.add("update")
            return tuple(torch.cat([torch.zeros_like(own), own], dim=2) for own in (key_states, value_states))  # type: ignore[return-value]  # two

        def get_seq_length(self) -> int:
            calls.add("get_seq_length")
            return 3

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            assert query_length == 3
            calls.add("get_mask_sizes")
            return 3 + query_length, 0

        def get_max_length(self) -> int:
            return -1

    model = tiny.base_model()
    cache = Cache(layers=[Layer() for _ in range(model.config.num_hidden_layers)])
    output = model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache, use_cache=True)
    assert output.logits.shape[:2] == (1, 3)
    assert calls == {"update", "get_seq_length", "get_mask_sizes"}


@pytest.mark.parametrize("method", ["__call__", "_encode_plus", "_switch_to_input_mode"])
def test_transformers_tokenizer_call_goes_through(method: str) -> None:
    """prompt/encoding.py: a tokenizer that overrides none of these is encoded by its `backend_tokenizer` alone."""
    calls: list[str] = []

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        inherited = getattr(PreTrainedTokenizerFast, method, None)  # of the last there is none, and it is called if there is
        return None if inherited is None else inherited(self, *args, **kwargs)

    plain = tiny.tokenizer()
    kind = type("Overriding", (PreTrainedTokenizerFast,), {method: recording})
    backend = plain.backend_tokenizer
    ids = kind(tokenizer_object=backend)("some text", add_special_tokens=False)["input_ids"]
    assert calls == [method]
    assert ids == backend.encode("some text", add_special_tokens=False).ids
    assert backend.truncation is None
    assert backend.padding is None


def test_a_tokenizer_encodes_with_the_backend_that_it_is_given() -> None:
    """prompt/literal.py sets `_tokenizer` of a shallow copy."""
    tokenizer, backend = tiny.tokenizer(), Tokenizer(models.WordLevel({"<other>": 0}, unk_token="<other>"))
    tokenizer._tokenizer = backend
    assert (tokenizer.backend_tokenizer, tokenizer("a")["input_ids"]) == (backend, [0])


class LoggedTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """Records which of the methods that training/trainer.py overrides are called, and with what."""

    def __init__(self, **kwargs: Any) -> None:
        self.calls: list[str] = []
        self.epochs: list[int] = []
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        self.calls.append("_get_train_sampler")
        epochs = self.epochs

        class Sampler(torch.utils.data.SequentialSampler):
            def set_epoch(self, epoch: int) -> None:
                epochs.append(epoch)

        return Sampler(self.train_dataset)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_loss": float(self.state.global_step)}  # the first checkpoint is the best
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.calls.append("_save")
        assert output_dir is not None
        Path(output_dir).mkdir()
        (Path(output_dir) / "own").touch()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.calls.append(f"_load_from_checkpoint {Path(resume_from_checkpoint).name}")

    def _load_best_model(self) -> None:
        self.calls.append(f"_load_best_model {Path(self.state.best_model_checkpoint).name}")


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.weight * x.float()).mean()}


def test_transformers_trainer_calls_the_methods_that_are_overridden(tmp_path: Path) -> None:
    """training/trainer.py: batches, checkpoints, their resumption and the choice of the best go through these methods."""

    def make_trainer(steps: int) -> LoggedTrainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, eval_strategy="steps", eval_steps=1,
            save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
            greater_is_better=False, remove_unused_columns=False, use_cpu=True, report_to=[], disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        rows = [{"x": index} for index in range(2)]
        trainer = LoggedTrainer(model=Loss(), args=arguments, train_dataset=rows, eval_dataset=rows)
        assert isinstance(trainer.model_accepts_loss_kwargs, bool)
        assert trainer.args.train_batch_size == 2
        return trainer

    first = make_trainer(2)
    first.train()
    assert first.calls == ["_get_train_sampler", "_save", "_save", "_load_best_model checkpoint-1"]
    assert sorted(set(first.epochs)) == [0, 1]  # told before each epoch
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "own").exists()
    # Written last: a checkpoint that has it is whole.
    assert TRAINER_STATE_NAME == "trainer_state.json"
    written = {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert written[TRAINER_STATE_NAME] == max(written.values())

    second = make_trainer(3)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.calls[0] == "_load_from_checkpoint checkpoint-2"
    assert second.calls.count("_save") == 1


def test_accelerate_hf_hook_execution_device_and_wrapped_forward() -> None:
    """base/placement.py: where a module computes; model/trunk.py restores the wrapped `forward`, which is the instance's."""
    hooks = pytest.importorskip("accelerate.hooks")
    layer = nn.Linear(2, 2)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    assert layer._hf_hook.execution_device == "cpu"
    assert "forward" in layer.__dict__
    hooks.add_hook_to_module(layer, hooks.ModelHook(), append=True)
    assert [getattr(hook, "execution_device", None) for hook in layer._hf_hook.hooks] == ["cpu", None]


def test_torch_tensor_version_counts_writes() -> None:
    """passes/probes.py: a tensor that was written to between two layers is not the same input."""
    x = torch.zeros(2)
    before = x._version
    x.add_(1)
    assert x._version > before
    assert (x + 1)._version == 0


def test_torch_module_modules_is_the_table_that_attributes_come_from() -> None:
    """model/attachment.py and base/int8.py exchange layers in it."""
    parent = nn.Sequential()
    parent.add_module("part", nn.Identity())
    replacement = nn.Linear(1, 1)
    parent._modules["part"] = replacement
    assert parent.part is replacement
    assert dict(parent.named_modules())["part"] is replacement


def test_torch_onednn_qlinear_multiplies_bytes() -> None:
    """base/int8.py: `torch.ops.onednn.qlinear_prepack` and `qlinear_pointwise` are its matrix products."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch
        pytest.skip("this torch has no oneDNN, without which the server refuses int8")
    weight = torch.arange(-8, 8, dtype=torch.int8).reshape(2, 8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scales, zero_points = torch.tensor([1.0, 2.0]), torch.zeros(2, dtype=torch.int64)
    x = torch.arange(8, dtype=torch.uint8).reshape(1, 8)
    y = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 3, packed, scales, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )
    assert y.tolist() == ((x.float() - 3) @ weight.float().T * scales).tolist()


def test_triton_astsource_and_gputarget() -> None:
    """scalabl_kernels/tools/compiled.py compiles by them for GPUs that are not here."""
    compiler = pytest.importorskip("triton.compiler", reason="triton is not installed; it is for Linux")
    from triton.backends.compiler import GPUTarget

    assert list(inspect.signature(compiler.ASTSource).parameters)[:4] == ["fn", "signature", "constexprs", "attrs"]
    assert (GPUTarget("cuda", 80, 32).backend, GPUTarget("hip", "gfx942", 64).warp_size) == ("cuda", 64)


def test_peft_layer_active_adapter() -> None:
    """benchmarks/serving/peers.py exchanges LoRAs by it, which costs less than `set_adapter`."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    nn.init.ones_(layer.lora_B["two"].weight)  # zero as in "one", until it is trained
    outputs = []
    for name in ("one", "two"):
        layer._active_adapter = name
        outputs.append(model(torch.ones(1, 2)))
    assert not torch.equal(*outputs)
