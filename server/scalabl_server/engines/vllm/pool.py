"""A pool of vLLM servers with the same adapters: chooses a server for each call, and takes failed servers out and back in.

A server is used only after it was examined. After a failure its thread examines it again. Calls do not change a server, so
a call can safely be repeated on a second server if the first one fails or is slow.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from scalabl.errors import ScalaBLError
from scalabl_server.engines.vllm.client import CallError, Models, Outcome, VllmClient
from scalabl_server.engines.vllm.examination import Examined, examine
from scalabl_server.observe.metrics import Metrics
from scalabl_server.problems import ProblemError

logger = logging.getLogger("scalabl")

LOOK_SECONDS = 5.0  # interval between checks of a server in use
PAUSES = (0.5, 30.0)  # seconds until a failed server is examined again: from the first, doubled up to the second


class EngineError(ScalaBLError):
    """No vLLM server can be used."""


@dataclass(eq=False)
class Replica:
    """One server and its state. Changed only under the pool's lock.

    Attributes:
        ready: whether it may get calls.
        cause: why it is not ready; empty when it is.
        refused: whether its configuration is unsuitable, so that waiting will not help.
        failures: since it was ready last.
        max_tokens: its limit on a prompt together with its generated tokens.
        wake: set to check the server at once.
    """

    client: VllmClient
    ready: bool = False
    cause: str = "not examined yet"
    refused: bool = False
    in_flight: int = 0
    failures: int = 0
    max_tokens: int | None = None
    wake: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Call:
    """A call with B prompts for one LoRA of an adapter."""

    adapter: Examined
    name: str
    prompts: Sequence[Sequence[int]]


class VllmPool:
    """The servers behind `--engine-url`.

    Args:
        folder: where LoRAs are written for servers that lack them.
        timeout: seconds that one call may take.
    """

    def __init__(self, clients: Sequence[VllmClient], folder: Path, timeout: float) -> None:
        self.replicas = [Replica(client) for client in clients]
        self.metrics: Metrics | None = None
        self._folder, self._timeout = folder, timeout
        self._adapters: list[Examined] = []
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._closed = threading.Event()
        self._pace: float | None = None  # moving average of the seconds per token; None before the first pass
        self._threads = ThreadPoolExecutor(128, thread_name_prefix="vllm")

    def start(self, adapters: Sequence[Examined], seconds: float) -> None:
        """Examine the servers until one of them can be used.

        Raises:
            EngineError: all of them are unsuitable, or none can be used within `seconds`.
        """
        self._adapters = list(adapters)
        for replica in self.replicas:
            threading.Thread(
                target=self._look_after, args=(replica,), name=f"look-{replica.client.name}", daemon=True
            ).start()
        with self._changed:
            usable = self._changed.wait_for(
                lambda: any(r.ready for r in self.replicas) or all(r.refused for r in self.replicas), seconds
            )
            if any(replica.ready for replica in self.replicas):
                return
            refused, causes = usable, self._causes()
        self.close()
        reason = "no vLLM server is suitable" if refused else f"no vLLM server could be used within {seconds:g} s"
        raise EngineError(f"{reason}: {causes}")

    def close(self) -> None:
        """Stop the threads and close the connections."""
        self._closed.set()
        for replica in self.replicas:
            replica.wake.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for replica in self.replicas:
            replica.client.close()

    def check_ready(self) -> None:
        """Check that at least one server can be used.

        Raises:
            ProblemError: `engine-unavailable`, with the cause for each server.
        """
        with self._lock:
            if not any(replica.ready for replica in self.replicas):
                raise self._unavailable()

    def add(self, adapter: Examined) -> None:
        """Make every server in use load an adapter. Those that cannot are taken out of use.

        Raises:
            EngineError: no server can load it; then nothing has changed.
        """
        with self._lock:
            ready = [replica for replica in self.replicas if replica.ready]
        failed: dict[Replica, CallError] = {}
        for replica in ready:
            try:
                examine(replica.client, replica.client.models(), adapter, self._folder)
            except CallError as error:
                failed[replica] = error
        if len(failed) == len(ready):
            raise EngineError(
                "; ".join(f"{replica.client.name}: {error.cause}" for replica, error in failed.items())
                or "no vLLM server is ready"
            )
        with self._lock:
            self._adapters.append(adapter)
        for replica, cause in failed.items():
            self._failed(replica, cause)

    def remove(self, adapter: Examined) -> None:
        """Make the servers unload an adapter, if they can. A gateway that still uses it will make them load it again."""
        with self._lock:
            if adapter not in self._adapters:
                return
            self._adapters.remove(adapter)
            still_needed = {name for other in self._adapters for name in other.loras.all_names}
            ready = [replica for replica in self.replicas if replica.ready]
        for replica in ready:
            for name in adapter.loras.all_names:
                if name in still_needed:  # another adapter has the same files
                    continue
                try:
                    replica.client.unload(name)
                except CallError as error:
                    logger.info("engine %s did not unload %s: %s", replica.client.name, name, error.cause)
                    break

    def score(self, calls: Sequence[Call], seconds: float) -> list[Tensor]:
        """For each call the log-probabilities [B, C] of the adapter's choices. All calls run at the same time.

        If a server fails, its call is repeated on another one. A call that takes far longer than the others is sent to a
        second server too, and the first answer counts.

        Raises:
            ProblemError: `engine-unavailable` if no server is left for a call or `seconds` have passed;
                `unknown-adapter` if the adapter was unloaded in the meantime.
            CallError: the call is wrong, on any server.
        """
        began = time.monotonic()
        deadline = began + seconds
        tokens = sum(len(prompt) for call in calls for prompt in call.prompts)
        expected = self._timeout if self._pace is None else self._pace * tokens
        results: dict[int, Tensor] = {}
        tried: list[list[Replica]] = [[] for _ in calls]
        running: dict[Future[Tensor], tuple[int, Replica, float]] = {}
        longest = 0.0

        def launch(index: int) -> bool:
            replica = self._take(tried[index])
            if replica is None:
                return False
            tried[index].append(replica)
            now = time.monotonic()
            future = self._threads.submit(self._call, replica, calls[index], deadline - now)
            running[future] = (index, replica, now)
            return True

        for index in range(len(calls)):
            if not launch(index):
                raise self._unavailable_now()
        while len(results) < len(calls):
            patience = max(1.0, 4 * max(longest, expected))
            done, _ = wait(running, min(0.25 * patience, max(0.0, deadline - time.monotonic())), FIRST_COMPLETED)
            now = time.monotonic()
            for future in done:
                index, _, started = running.pop(future)
                error = future.exception()
                if error is None:
                    results.setdefault(index, future.result())
                    longest = max(longest, now - started)
                    self._slower_than_the_second(index, running, now - patience)
                elif not isinstance(error, CallError) or error.outcome == "rejected":
                    raise error
                elif index not in results and all(other != index for other, _, _ in running.values()) and not launch(index):
                    raise self._unavailable_now()
            if now >= deadline and len(results) < len(calls):
                raise ProblemError(
                    "engine-unavailable", f"the vLLM servers did not answer within {seconds:.3g} s", retry_after=PAUSES[0]
                )
            for index, started in [(index, started) for index, _, started in running.values()]:
                if index not in results and len(tried[index]) == 1 and now - started > patience and launch(index):
                    self._count_second()
        pace = (time.monotonic() - began) / max(1, tokens)
        self._pace = pace if self._pace is None else 0.9 * self._pace + 0.1 * pace
        return [results[index] for index in range(len(calls))]

    def _slower_than_the_second(
        self, index: int, running: dict[Future[Tensor], tuple[int, Replica, float]], before: float
    ) -> None:
        """Take servers out of use that got a call before the time `before`, and were slower than the second server."""
        for other, replica, started in running.values():
            if other == index and started < before:
                self._failed(replica, CallError("slow", "it took far longer than another server"))

    def _take(self, tried: Sequence[Replica]) -> Replica | None:
        """The ready server with the fewest running calls that was not tried yet; among equals, they take turns."""
        with self._lock:
            free = [replica for replica in self.replicas if replica.ready and replica not in tried]
            if not free:
                return None
            chosen = min(free, key=lambda replica: replica.in_flight)
            self.replicas.remove(chosen)  # move it to the end, so that equals take turns
            self.replicas.append(chosen)
            chosen.in_flight += 1
            return chosen

    def _call(self, replica: Replica, call: Call, seconds: float) -> Tensor:
        started = time.monotonic()
        outcome: Outcome = "ok"
        try:
            return replica.client.score(call.name, call.prompts, call.adapter.tokens, max(seconds, 0.001))
        except CallError as error:
            outcome = error.outcome
            if outcome == "absent" and call.adapter not in self._adapters:
                raise ProblemError(
                    "unknown-adapter", "the adapter was unloaded while the request waited", field="adapter"
                ) from None
            if outcome != "rejected":
                self._failed(replica, error)
            raise
        finally:
            with self._lock:
                replica.in_flight -= 1
            if self.metrics is not None:
                self.metrics.engine_calls.labels(replica.client.name, outcome).inc()
                self.metrics.engine_call_duration.labels(replica.client.name).observe(time.monotonic() - started)

    def _count_second(self) -> None:
        if self.metrics is not None:
            self.metrics.engine_second_calls.inc()

    def _failed(self, replica: Replica, error: CallError) -> None:
        with self._changed:
            was_ready, previous_cause = replica.ready, replica.cause
            replica.ready, replica.cause, replica.refused = False, error.cause, error.outcome == "refused"
            replica.failures += 1
            self._changed.notify_all()
        self._show(replica)
        if was_ready:
            logger.warning("engine %s is taken out of use: %s", replica.client.name, error.cause)
            if error.outcome != "slow":  # a slow server gets a pause first
                replica.wake.set()
        elif error.cause != previous_cause:
            logger.warning("engine %s cannot be used: %s", replica.client.name, error.cause)

    def _look_after(self, replica: Replica) -> None:
        """Examine a server, and check it again from time to time. Runs on a thread of its own for each server."""
        while not self._closed.is_set():
            try:
                models = replica.client.models()
                with self._lock:
                    adapters, ready = list(self._adapters), replica.ready
                if not ready or not models.adapters.issuperset(n for adapter in adapters for n in adapter.loras.all_names):
                    for adapter in adapters:
                        examine(replica.client, models, adapter, self._folder)
                self._passed(replica, models)
            except CallError as error:
                self._failed(replica, error)
            except Exception:
                if self._closed.is_set():  # the error comes from the closed connections
                    return
                self._failed(replica, CallError("broken", "it could not be examined; see this server's log for the reason"))
                logger.exception("engine %s could not be examined", replica.client.name)
            first, last = PAUSES
            pause = LOOK_SECONDS if replica.ready else min(last, first * 2.0 ** min(replica.failures - 1, 10))
            replica.wake.wait(pause)
            replica.wake.clear()

    def _passed(self, replica: Replica, models: Models) -> None:
        with self._changed:
            is_new, replica.ready = not replica.ready, True
            replica.cause, replica.refused, replica.max_tokens = "", False, models.max_tokens
            replica.failures = 0
            self._changed.notify_all()
        if is_new:
            self._show(replica)
            logger.info("engine %s is ready, with the base model %s", replica.client.name, models.base)

    def _show(self, replica: Replica) -> None:
        if self.metrics is not None:
            self.metrics.engine_ready.labels(replica.client.name).set(float(replica.ready))

    def watch(self, metrics: Metrics) -> None:
        """Report to these metrics from now on."""
        self.metrics = metrics
        for replica in list(self.replicas):
            self._show(replica)

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that all examined servers accept; None if no server names a limit."""
        limits = [replica.max_tokens for replica in list(self.replicas) if replica.max_tokens is not None]
        return min(limits, default=None)

    def _causes(self) -> str:
        return "; ".join(
            f"{replica.client.name}: {replica.cause}" for replica in sorted(self.replicas, key=lambda r: r.client.name)
        )

    def _unavailable(self) -> ProblemError:
        return ProblemError("engine-unavailable", f"no vLLM server can answer: {self._causes()}", retry_after=2)

    def _unavailable_now(self) -> ProblemError:
        with self._lock:
            return self._unavailable()
