"""Real servers on tiny models: the application in this process, asked over ASGI."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from scalabl_server.app import create_app
from scalabl_server.batching.jobs import Job, Result
from scalabl_server.engines.interface import Engine, Served
from scalabl_server.engines.load import load_engine
from scalabl_server.engines.transformers_engine import LocalAdapter, TransformersEngine
from scalabl_server.settings import ServeSettings

from scalabl.model.scalabl_model import ScalaBLModel
from tests import tiny

Load = Callable[[ServeSettings], Engine]


@pytest.fixture(autouse=True, scope="session")
def _no_settings_from_outside() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SCALABL_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and for it the adapters `colours` (classification) and `letters` (multiple choice)."""
    folder = tmp_path_factory.mktemp("served")
    tiny.write_base(folder / "base")
    tiny.write_adapter(folder / "colours")
    tiny.write_adapter(folder / "letters", task=tiny.MULTIPLE_CHOICE)
    return folder


def settings_for(folders: Path, adapter: str = "colours", **changes: Any) -> ServeSettings:
    fields = {"adapter": folders / adapter, "model": str(folders / "base"), "device": "cpu", "max_input_tokens": 120}
    fields |= {"warmup": "quick", "outcomes_timeout": 10.0}  # a busy machine's disk may take longer than the default
    return ServeSettings(**fields | changes)


def model_of(engine: Engine | None, adapter: str | None = None) -> ScalaBLModel:
    """What answers for an adapter of the default engine."""
    assert engine is not None
    served = engine.adapter(adapter)
    assert isinstance(served, LocalAdapter)
    return served.model


@contextmanager
def serving(settings: ServeSettings, load: Load = load_engine) -> Iterator[TestClient]:
    """A ready server. Errors come back as answers, as they would over a network."""
    with TestClient(create_app(settings, load=load), raise_server_exceptions=False) as client:
        wait_until(lambda: client.get("/health/ready").status_code == 200)
        yield client


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def colours(folders: Path, _no_settings_from_outside: None) -> Iterator[TestClient]:
    with serving(settings_for(folders)) as client:
        yield client


@pytest.fixture(scope="session")
def letters(folders: Path, _no_settings_from_outside: None) -> Iterator[TestClient]:
    with serving(settings_for(folders, "letters")) as client:
        yield client


@pytest.fixture
def serve(folders: Path) -> Iterator[Callable[..., TestClient]]:
    """Starts a server with settings of its own; stopped when the test ends."""
    with ExitStack() as stack:

        def start(adapter: str = "colours", load: Load = load_engine, **changes: Any) -> TestClient:
            return stack.enter_context(serving(settings_for(folders, adapter, **changes), load))

        yield start


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class GatedEngine(TransformersEngine):
    """An engine whose passes wait at a gate, and fail while `broken` is set."""

    gate: threading.Event
    broken: threading.Event
    entered: threading.Event

    def run(self, served: Sequence[Served], sequences: Sequence[Sequence[int]], jobs: Sequence[Job]) -> list[Result]:
        self.entered.set()
        assert self.gate.wait(30)
        if self.broken.is_set():
            raise RuntimeError("secret detail of /a/path")
        return super().run(served, sequences, jobs)


@dataclasses.dataclass
class Gate:
    """Holds and breaks the passes of the engine that `load` makes."""

    open: threading.Event = dataclasses.field(default_factory=threading.Event)
    broken: threading.Event = dataclasses.field(default_factory=threading.Event)
    entered: threading.Event = dataclasses.field(default_factory=threading.Event)

    def load(self, settings: ServeSettings) -> Engine:
        engine = load_engine(settings)
        fields = {field.name: getattr(engine, field.name) for field in dataclasses.fields(engine)}
        return GatedEngine(**fields, gate=self.open, broken=self.broken, entered=self.entered)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()
