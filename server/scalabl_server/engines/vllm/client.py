"""The HTTP client of one vLLM server: its LoRAs, and exact log-probabilities of given tokens. `pool` chooses the server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx2
import torch
from torch import Tensor

CONNECT_SECONDS = 2.0
TOKENS_PER_CALL = 128  # vLLM's limit on `logprob_token_ids`

# The outcome of a call. unreachable, slow, broken: the server has a problem that may pass. absent: it lacks the adapter, for
# example after a restart. refused: its configuration is unsuitable. rejected: the request is wrong, on any server.
Outcome = Literal["ok", "unreachable", "slow", "broken", "absent", "refused", "rejected"]

# Sampling parameters that leave the logits unchanged, whatever the model's generation_config and --logprobs-mode say.
PLAIN = {
    "max_tokens": 1,
    "temperature": 0,
    "top_p": 1,
    "top_k": 0,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "ignore_eos": True,
    "return_tokens_as_token_ids": True,
}


class CallError(Exception):
    """A call that failed: its outcome, and the cause in words."""

    def __init__(self, outcome: Outcome, cause: str) -> None:
        super().__init__(cause)
        self.outcome, self.cause = outcome, cause


@dataclass(frozen=True)
class Models:
    """The models of a server.

    Attributes:
        base: name of the base model on this server.
        max_tokens: limit on a prompt together with its generated tokens; None if the server does not say.
        adapters: names of the loaded LoRAs.
    """

    base: str
    max_tokens: int | None
    adapters: frozenset[str]


class VllmClient:
    """Calls one server. Any number of threads may share a client.

    Args:
        url: http://host:port, with a path if a proxy needs one.
        timeout: seconds that an answer may take.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        parsed = httpx2.URL(url)
        self.name = f"{parsed.host}:{parsed.port}" if parsed.port is not None else parsed.host
        self._timeout = timeout
        self._client = httpx2.Client(
            base_url=url.rstrip("/"),
            headers={"authorization": f"Bearer {api_key}"} if api_key is not None else {},
            limits=httpx2.Limits(max_connections=None),
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def models(self) -> Models:
        """The models of the server."""
        answer = self._ask("GET", "/v1/models", timeout=min(self._timeout, 10.0))
        try:
            cards = answer["data"]
            base = next(card for card in cards if card.get("parent") is None)
            adapters = frozenset(str(card["id"]) for card in cards if card.get("parent") is not None)
            return Models(str(base["id"]), base.get("max_model_len"), adapters)
        except (KeyError, TypeError, AttributeError, StopIteration):
            raise CallError(
                "refused", "its answer to /v1/models is not that of vLLM; --engine-url must point to vLLM servers"
            ) from None

    def load(self, name: str, path: str) -> None:
        """Make the server load a LoRA from a folder that it can read."""
        try:
            self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except CallError as error:
            if "already been loaded" in error.cause:  # by another gateway in the meantime
                return
            if error.outcome in ("absent", "rejected", "broken"):
                raise CallError(
                    "refused",
                    f"it has no adapter {name} and does not load it ({error.cause}); start it with --enable-lora and "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, with --engine-adapter-dir readable under the same path, or pass it "
                    "the files of `scalabl export vllm` with --lora-modules",
                ) from None
            raise

    def unload(self, name: str) -> None:
        """Make the server unload a LoRA."""
        self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def score(
        self, model: str, prompts: Sequence[Sequence[int]], tokens: Sequence[int], timeout: float | None = None
    ) -> Tensor:
        """The log-probabilities of C tokens after each of B prompts: [B, C] float32.

        If the server runs with --logprobs-mode raw_logits, they are logits, which differ by a constant per row.

        Raises:
            CallError: one of the tokens has no log-probability, or another model than `model` answered.
        """
        columns = []
        for start in range(0, len(tokens), TOKENS_PER_CALL):
            wanted = list(tokens[start : start + TOKENS_PER_CALL])
            tops = self._tops(model, prompts, timeout, logprobs=1, logprob_token_ids=wanted)
            try:
                columns.append(torch.tensor([[top[token] for token in wanted] for top in tops], dtype=torch.float32))
            except KeyError as error:
                raise CallError(
                    "refused",
                    f"it gives no log-probability of the token {error.args[0]}, so answers would not be exact; use vLLM "
                    "0.32 or newer, which supports logprob_token_ids in /v1/completions",
                ) from None
        return torch.cat(columns, dim=1)

    def most_likely(self, model: str, prompt: Sequence[int], count: int) -> dict[int, float]:
        """The `count` most likely next tokens with their log-probabilities, computed by vLLM's ordinary top-k logprobs."""
        (top,) = self._tops(model, [prompt], None, logprobs=count)
        return top

    def _tops(
        self, model: str, prompts: Sequence[Sequence[int]], timeout: float | None, **wanted: Any
    ) -> list[dict[int, float]]:
        """The returned log-probabilities of the next token after each prompt: token id -> log-probability."""
        body = {"model": model, "prompt": [list(prompt) for prompt in prompts], **PLAIN, **wanted}
        answer = self._ask("POST", "/v1/completions", body, timeout)
        try:
            if answer["model"] != model:
                raise CallError("refused", f"it answered for {answer['model']!r} instead of {model!r}")
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            tops = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
            log_probabilities = [
                {int(key.removeprefix("token_id:")): float(value) for key, value in top.items()} for top in tops
            ]
        except (KeyError, TypeError, AttributeError, IndexError, ValueError):
            raise CallError(
                "refused", "its answer has no log-probabilities by token id; --engine-url must point to vLLM servers"
            ) from None
        if len(log_probabilities) != len(prompts):
            raise CallError("broken", f"it answered only {len(log_probabilities)} of {len(prompts)} prompts")
        return log_probabilities

    def _ask(self, method: str, path: str, body: object = None, timeout: float | None = None) -> Any:
        """The JSON of the answer; None if the answer is text.

        Raises:
            CallError: the call failed.
        """
        seconds = self._timeout if timeout is None else min(timeout, self._timeout)
        try:
            response = self._client.request(
                method, path, json=body, timeout=httpx2.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds))
            )
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise CallError("unreachable", f"it cannot be reached ({_first_line(error)})") from None
        except httpx2.TimeoutException:
            raise CallError("slow", f"no answer within {seconds:.3g} s") from None
        except httpx2.HTTPError as error:
            raise CallError("unreachable", f"the connection broke ({_first_line(error)})") from None
        if response.is_success:
            try:
                return response.json() if response.headers.get("content-type", "").startswith("application/json") else None
            except (json.JSONDecodeError, UnicodeDecodeError):
                raise CallError("broken", "its answer is not JSON") from None
        raise CallError(_outcome(response.status_code), f"{response.status_code}: {_message(response)}")


def _outcome(status: int) -> Outcome:
    if status == 404:
        return "absent"
    if status in (401, 403):
        return "refused"
    return "rejected" if 400 <= status < 500 and status not in (408, 409, 429) else "broken"


def _message(response: httpx2.Response) -> str:
    try:
        return str(response.json()["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return response.text[:300] or response.reason_phrase


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
