"""Every setting of `scalabl serve`: one field is one flag and one environment variable, `SCALABL_<FLAG>`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from scalabl.config import Quantization
from scalabl.model.posterior import DEFAULT_SCHEME, Scheme

LogFormat = Literal["text", "json"]

ADAPTER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

LONGEST_TOKEN = 16  # characters per token that no ordinary text exceeds; for the limit on characters


class ServeSettings(BaseSettings):
    """Read from arguments first, then from the environment, then from the defaults here."""

    model_config = SettingsConfigDict(env_prefix="SCALABL_", extra="forbid", frozen=True)

    adapter: Path = Field(description="The adapter directory to serve.")
    adapter_name: str | None = Field(default=None, description="Its name in the API (default: the folder's name).")
    adapters: str | None = Field(
        default=None, description="More adapters for the same base model: name=folder, comma-separated."
    )
    model: str | None = Field(
        default=None, description="Base model: a hub id or a folder (default: the one that the adapter names)."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on (0: any free one).")
    device: str = Field(default="auto", description="cpu, cuda, cuda:1, … (auto: a GPU when there is one).")
    device_map: str | None = Field(
        default=None,
        description="Divide the base model over devices: auto, balanced, balanced_low_0, sequential, or a JSON file of "
        "module names and devices (a number, a name, disk); in place of the device.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Weights and activations (auto: bfloat16 on a GPU that has it, else float32)."
    )
    quantization: Quantization | None = Field(
        default=None,
        description="Linear layers in lower precision: int8 (weights and activations, on a CPU), or bitsandbytes' bnb-8bit "
        "or bnb-4bit, made for a GPU (default: as the dtype says). What it changes is measured at the start.",
    )
    probe_file: Path | None = Field(
        default=None,
        description="Inputs on which that is measured, JSONL with text and choices (default: eight that come with it).",
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of the model (default: torch's choice).")
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers", description="What runs the base model: this process, or vLLM servers at engine_url."
    )
    engine_url: str | None = Field(
        default=None, description="vLLM servers, http://host:port, comma-separated; each has all of the base model."
    )
    engine_api_key: SecretStr | None = Field(default=None, description="The key that they want (vLLM's --api-key).")
    engine_adapter_dir: Path | None = Field(
        default=None,
        description="Where LoRAs are written that they lack and load at run time; they read it under the same path "
        "(default: engine-adapters in the data folder).",
    )
    engine_timeout: float = Field(default=30.0, gt=0, description="Seconds that one call of the engine may take.")
    engine_start_timeout: float = Field(default=600.0, gt=0, description="Seconds to wait for the engine at the start.")
    num_samples: int = Field(default=16, ge=1, description="K, the posterior samples when a request names no number.")
    max_samples: int = Field(default=256, ge=1, description="The most samples a request may ask for.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the draws; replicas with one seed agree.")
    draw_scheme: Scheme = Field(default=DEFAULT_SCHEME, description="gaussian, antithetic or sobol.")
    max_input_tokens: int | None = Field(
        default=None, ge=1, description="The longest prompt, in tokens (default: what the base model was made for)."
    )
    max_batch_tokens: int = Field(
        default=16384,
        ge=1,
        description="The most rows (inputs x samples) times length in one forward pass; a larger input is refused.",
    )
    target_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Join waiting inputs up to this many rows times padded length "
        "(default: measured at the start, on a CPU where larger passes gain nothing more, on a GPU what its memory holds).",
    )
    max_inputs: int = Field(default=256, ge=1, description="The most inputs in one request.")
    max_input_chars: int | None = Field(
        default=None, ge=1, description="The longest text, in characters (default: 16 for each token of max_input_tokens)."
    )
    max_choices: int = Field(default=256, ge=2, description="The most choices that may come with an input.")
    max_choice_chars: int = Field(default=4000, ge=1, description="The longest such choice, in characters.")
    max_sample_values: int = Field(
        default=1_000_000, ge=1, description="The most probabilities that return_samples may add to an answer."
    )
    max_queue: int = Field(default=1024, ge=1, description="The most inputs that may wait; beyond it the answer is 429.")
    max_queue_tokens: int | None = Field(
        default=None,
        ge=1,
        description="The most tokens (inputs x samples x length) that may wait (default: 64 times max_batch_tokens).",
    )
    prefix_cache_bytes: int = Field(
        default=2**29,
        ge=0,
        description="The most bytes of keys and values to keep of what prompts begin with alike (0: none).",
    )
    max_priority: int = Field(
        default=10,
        ge=0,
        description="The furthest from 0 that a request's priority may be; a step is worth a second of waiting (0: no "
        "priorities).",
    )
    max_body_bytes: int = Field(default=2_000_000, ge=1, description="The largest request body.")
    max_header_bytes: int = Field(default=16_384, ge=256, description="The most bytes of a request's path and headers.")
    header_timeout: float = Field(default=10.0, gt=0, description="Seconds that a request's headers may take to arrive.")
    body_timeout: float = Field(default=30.0, gt=0, description="Seconds that a request's body may take to arrive.")
    request_timeout: float = Field(
        default=60.0,
        gt=0,
        description="Seconds until a request is given up with a 504; its header X-Request-Timeout may ask for less.",
    )
    worker_timeout: float = Field(
        default=300.0, gt=0, description="Seconds after which a forward pass counts as stuck and /health/live fails."
    )
    shutdown_timeout: int = Field(default=30, ge=0, description="Seconds that running requests get after SIGTERM.")
    drain_delay: float = Field(
        default=0.0, ge=0, description="Seconds to answer 503 after SIGTERM at least, for load balancers to notice."
    )
    warmup: Literal["auto", "full", "quick"] = Field(
        default="auto",
        description="full: run the largest passes before being ready; quick: a small one, and measure nothing (auto: full "
        "on a GPU).",
    )
    enable_adapter_loading: bool = Field(default=False, description="Load and unload adapters by request, at /v1.")
    adapter_root: Path | None = Field(default=None, description="The folder below which such adapters lie.")
    max_adapters: int = Field(default=32, ge=1, description="The most adapters that are loaded at a time.")
    max_adapter_bytes: int = Field(default=2**30, ge=1, description="The largest adapter, in bytes of its files.")
    api_keys: SecretStr | None = Field(
        default=None,
        description="Comma-separated keys: name:key, name:sha256:<hex> or key. With any, every route but health, metrics, "
        "the documentation and the dashboard's page (not its data) wants one.",
    )
    api_keys_file: Path | None = Field(
        default=None, description="A file with one name:key or name:sha256:<hex> a line; read again when it changes."
    )
    cors_origins: str = Field(
        default="", description="Comma-separated origins whose pages may call this server (default: none; *: any)."
    )
    admin_host: str = Field(default="127.0.0.1", description="Address of the admin port.")
    admin_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="A second port for /metrics and /health; the main one then has no /metrics (default: none).",
    )
    dashboard: bool = Field(
        default=True, description="Serve the page at /dashboard, on the main port, and its data at /v1/dashboard."
    )
    ssl_certfile: Path | None = Field(default=None, description="Certificate chain (PEM); with it the main port speaks TLS.")
    ssl_keyfile: Path | None = Field(default=None, description="Its private key (PEM), when it is not in the same file.")
    ssl_ca_certs: Path | None = Field(
        default=None, description="Authorities (PEM); with it clients must show a certificate from one of them."
    )
    gguf_file: str | None = Field(default=None, description="Read the weights from this GGUF file of the base model.")
    allow_pickle: bool = Field(
        default=False, description="Accept base models whose weights are PyTorch pickles, read with weights_only."
    )
    data_dir: Path | None = Field(
        default=None, description="Folder of what the server keeps (default: scalabl in $XDG_DATA_HOME or ~/.local/share)."
    )
    outcomes_url: SecretStr | None = Field(
        default=None,
        description="Database of predictions and their labels: sqlite:////file, postgresql://user@host/name, or none to "
        "store nothing (default: SQLite in outcomes.db in the data folder).",
    )
    outcomes_required: bool = Field(
        default=False, description="Refuse predictions that cannot be stored with a 503 (else: answered, recorded false)."
    )
    outcomes_timeout: float = Field(
        default=2.0, gt=0, description="Seconds that a request waits for the outcomes database before it counts as down."
    )
    outcomes_retention_days: float = Field(default=90.0, gt=0, description="Days until a prediction is deleted.")
    outcomes_max_rows: int = Field(
        default=1_000_000, ge=1, description="The most predictions to keep; the oldest make room for new ones."
    )
    store_inputs: bool = Field(default=False, description="Store the inputs' text too, not only its hash.")
    input_hash_key: SecretStr | None = Field(
        default=None,
        description="Key of the inputs' hash, HMAC-SHA-256 (default: plain SHA-256, against which guesses can be tried).",
    )
    replica_id: str | None = Field(
        default=None, min_length=1, description="Name of this replica's totals, kept over restarts (default: host:port)."
    )
    trust_remote_code: bool = Field(default=False, description="Run model code that comes with the base model.")
    log_format: LogFormat = Field(default="text", description="text or json, one line per record, on standard error.")
    otlp_endpoint: str | None = Field(
        default=None, description="Send spans to this OpenTelemetry collector over HTTP, as http://host:4318."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="How much to log.")

    @field_validator("adapters")
    @classmethod
    def _adapters_have_names(cls, adapters: str | None) -> str | None:
        names = [name for name, _ in _pairs(adapters)]
        for name, folder in _pairs(adapters):
            if not re.fullmatch(ADAPTER_NAME, name):
                raise ValueError(f"{name!r} is no adapter name; write name=folder, a name of letters, digits, '.', '_', '-'")
            if not folder:
                raise ValueError(f"{name!r} has no folder; write name=folder")
            if names.count(name) > 1:
                raise ValueError(f"the name {name!r} is given twice")
        return adapters

    @model_validator(mode="after")
    def _adapters_are_told_apart(self) -> Self:
        if self.default_adapter in dict(_pairs(self.adapters)):
            raise ValueError(f"--adapters: {self.default_adapter!r} is the name of --adapter already; choose another")
        return self

    @model_validator(mode="after")
    def _one_flag_says_where(self) -> Self:
        if self.device_map is not None and self.device != "auto":
            raise ValueError("--device-map says where the base model goes; leave --device out")
        return self

    @model_validator(mode="after")
    def _probes_have_a_use(self) -> Self:
        if self.probe_file is not None and self.quantization is None:
            raise ValueError("--probe-file is for --quantization, which is not set")
        return self

    @model_validator(mode="after")
    def _adapters_have_a_root(self) -> Self:
        if self.enable_adapter_loading and self.adapter_root is None:
            raise ValueError("--enable-adapter-loading needs --adapter-root, the folder below which adapters may lie")
        return self

    @model_validator(mode="after")
    def _engine_has_an_address(self) -> Self:
        if (self.engine == "vllm") != (self.engine_url is not None):
            raise ValueError("--engine vllm and --engine-url go together: give both, or neither")
        if self.engine == "vllm" and self.quantization is not None:
            raise ValueError("--quantization is the engine's own with --engine vllm; give it to the vLLM servers")
        if self.engine == "vllm" and self.device_map is not None:
            raise ValueError("--device-map is for the engine transformers; vLLM divides a model by flags of its own servers")
        for url in self.engine_urls:
            if not re.match(r"https?://[^/\s]", url):
                raise ValueError(f"--engine-url: {url!r} is no URL; write http://host:port, comma-separated")
        return self

    @property
    def engine_urls(self) -> list[str]:
        """The engine's servers."""
        return [url.strip() for url in (self.engine_url or "").split(",") if url.strip()]

    @property
    def data_folder(self) -> Path:
        """Where the server keeps things."""
        return self.data_dir or Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "scalabl"

    @property
    def default_adapter(self) -> str:
        """The name of the adapter that answers when a request names none."""
        return self.adapter_name or self.adapter.resolve().name

    @property
    def queue_tokens(self) -> int:
        """The tokens that may wait."""
        return self.max_queue_tokens or 64 * self.max_batch_tokens

    def longest_text(self, max_tokens: int) -> int:
        """Characters of the longest text, for prompts of so many tokens."""
        return self.max_input_chars or LONGEST_TOKEN * max_tokens

    def adapter_folders(self) -> dict[str, Path]:
        """Every adapter to load at the start by its name, the default one first."""
        return {self.default_adapter: self.adapter} | {name: Path(folder) for name, folder in _pairs(self.adapters)}

    def resolved_outcomes_url(self) -> str | None:
        """The database's URL, None when nothing is stored."""
        if self.outcomes_url is not None:
            url = self.outcomes_url.get_secret_value()
            return None if url == "none" else url
        return f"sqlite:///{self.data_folder.absolute() / 'outcomes.db'}"


def _pairs(adapters: str | None) -> list[tuple[str, str]]:
    """`name=folder` pairs; a part without a sign has no folder."""
    parts = [part.strip() for part in (adapters or "").split(",") if part.strip()]
    return [(name.strip(), folder.strip()) for name, _, folder in (part.partition("=") for part in parts)]
