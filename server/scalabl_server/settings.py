"""Every setting of `scalabl serve`: a field is a flag and the environment variable `SCALABL_<FLAG>`. Values only."""

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

LONGEST_TOKEN = 16  # characters per token; ordinary text has fewer. The default limit on characters follows from it


class ServeSettings(BaseSettings):
    """The settings of one server. A flag wins over the environment variable, which wins over the default here."""

    model_config = SettingsConfigDict(env_prefix="SCALABL_", extra="forbid", frozen=True)

    adapter: Path = Field(description="The adapter directory to serve.")
    adapter_name: str | None = Field(
        default=None, description="Name of the adapter in the API (default: the name of its folder)."
    )
    adapters: str | None = Field(
        default=None, description="More adapters on the same base model, as comma-separated name=folder pairs."
    )
    model: str | None = Field(
        default=None, description="Base model: a hub id or a folder (default: the base model that the adapter names)."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on (0: any free port).")
    device: str = Field(
        default="auto", description="Device of the model: cpu, cuda, cuda:1, … (auto: a GPU if there is one)."
    )
    device_map: str | None = Field(
        default=None,
        description="Split the base model over several devices: auto, balanced, balanced_low_0, sequential, or a JSON file "
        "that maps module names to devices (a GPU number, a device name, or disk). Cannot be combined with --device.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Data type of weights and activations (auto: bfloat16 on a GPU that supports it, else float32).",
    )
    quantization: Quantization | None = Field(
        default=None,
        description="Run the base model's linear layers in lower precision: int8 (weights and activations, on a CPU), or "
        "bnb-8bit or bnb-4bit (bitsandbytes, meant for a GPU). The default is the precision of --dtype. At start-up the "
        "server measures how much the answers change.",
    )
    probe_file: Path | None = Field(
        default=None,
        description="JSONL file of inputs, with text and choices, on which the effect of --quantization is measured "
        "(default: eight inputs that come with the server).",
    )
    threads: int | None = Field(
        default=None, ge=1, le=4096, description="Number of CPU threads for the model (default: torch decides)."
    )
    engine: Literal["transformers", "vllm"] = Field(
        default="transformers",
        description="What runs the base model: this process (transformers), or the vLLM servers at --engine-url.",
    )
    engine_url: str | None = Field(
        default=None,
        description="Comma-separated URLs of vLLM servers, http://host:port. Each server must hold the whole base model.",
    )
    engine_api_key: SecretStr | None = Field(default=None, description="API key of the vLLM servers (their --api-key).")
    engine_adapter_dir: Path | None = Field(
        default=None,
        description="Folder for LoRAs that the vLLM servers load at run time. They must see it under the same path "
        "(default: engine-adapters in the data folder).",
    )
    engine_timeout: float = Field(default=30.0, gt=0, description="Seconds that one call to a vLLM server may take.")
    engine_start_timeout: float = Field(default=600.0, gt=0, description="Seconds to wait for a vLLM server at start-up.")
    num_samples: int = Field(
        default=16,
        ge=1,
        le=2**20,
        description="Number of posterior samples (K) for a request that does not set num_samples.",
    )
    max_samples: int = Field(default=256, ge=1, description="Largest number of samples that a request may ask for.")
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="Seed of the posterior samples. Replicas with the same seed give the same answers.",
    )
    draw_scheme: Scheme = Field(
        default=DEFAULT_SCHEME, description="How posterior samples are drawn: gaussian, antithetic or sobol."
    )
    max_input_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Longest prompt, in tokens (default: the context length of the base model; if it has none, the size of "
        "the largest pass).",
    )
    max_batch_tokens: int = Field(
        default=16384,
        ge=1,
        description="Largest forward pass, in tokens: rows (inputs x samples) times length. An input that alone needs more "
        "is refused.",
    )
    target_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Batch waiting inputs up to this many tokens: rows (inputs x samples) times padded length. The default "
        "is measured at start-up: on a CPU the size beyond which larger passes are hardly faster, on a GPU what its memory "
        "holds.",
    )
    max_inputs: int = Field(default=256, ge=1, description="Largest number of inputs in one request.")
    max_input_chars: int | None = Field(
        default=None,
        ge=1,
        description="Longest input text, in characters (default: 16 times the longest prompt in tokens).",
    )
    max_choices: int = Field(default=256, ge=2, description="Largest number of choices that may come with an input.")
    max_choice_chars: int = Field(
        default=4000, ge=1, description="Longest choice that may come with an input, in characters."
    )
    max_sample_values: int = Field(
        default=1_000_000, ge=1, description="Largest number of probabilities that return_samples may add to an answer."
    )
    max_queue: int = Field(
        default=1024, ge=1, description="Largest number of inputs in the queue. Above it, requests are answered with 429."
    )
    max_queue_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Largest number of tokens (inputs x samples x length) in the queue. Above it, requests are answered "
        "with 429 (default: 64 times --max-batch-tokens).",
    )
    prefix_cache_bytes: int = Field(
        default=2**29,
        ge=0,
        description="Size of the prefix cache in bytes. It keeps the attention keys and values of beginnings that prompts "
        "share, so that they are computed once (0: no cache).",
    )
    max_priority: int = Field(
        default=10,
        ge=0,
        description="A request's priority may be from minus this number to this number. A priority one lower moves a "
        "request ahead as much as one second of waiting does (0: all requests have the same priority).",
    )
    max_body_bytes: int = Field(default=2_000_000, ge=1, description="Largest request body, in bytes.")
    max_header_bytes: int = Field(
        default=16_384, ge=256, description="Largest path and headers of a request together, in bytes."
    )
    header_timeout: float = Field(default=10.0, gt=0, description="Seconds that a request's headers may take to arrive.")
    body_timeout: float = Field(default=30.0, gt=0, description="Seconds that a request's body may take to arrive.")
    request_timeout: float = Field(
        default=60.0,
        gt=0,
        description="Seconds after which a request is answered with 504. Its header X-Request-Timeout may set a shorter "
        "time.",
    )
    worker_timeout: float = Field(
        default=300.0, gt=0, description="Seconds after which a forward pass counts as stuck and /health/live fails."
    )
    shutdown_timeout: int = Field(
        default=30, ge=0, description="Seconds that running requests have to finish after SIGTERM."
    )
    drain_delay: float = Field(
        default=0.0,
        ge=0,
        description="After SIGTERM, keep answering new requests with 503 for at least this many seconds, so that load "
        "balancers notice.",
    )
    warmup: Literal["auto", "full", "quick"] = Field(
        default="auto",
        description="full: run the largest passes before the server is ready. quick: run one small pass and measure nothing "
        "(auto: full on a GPU).",
    )
    enable_adapter_loading: bool = Field(
        default=False, description="Let clients load and unload adapters through routes under /v1."
    )
    adapter_root: Path | None = Field(default=None, description="Folder from which clients may load adapters.")
    max_adapters: int = Field(default=32, ge=1, description="Largest number of adapters loaded at the same time.")
    max_adapter_bytes: int = Field(
        default=2**30, ge=1, description="Largest adapter, as the total size of its files in bytes."
    )
    api_keys: SecretStr | None = Field(
        default=None,
        description="Comma-separated API keys: name:key, name:sha256:<hex> or key. If any is set, every route needs a key "
        "except health, metrics, the documentation and the dashboard's page (its data needs one).",
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="File of API keys, one name:key or name:sha256:<hex> per line. It is read again when it changes.",
    )
    cors_origins: str = Field(
        default="",
        description="Comma-separated origins of web pages that may call this server (default: none; *: any origin).",
    )
    admin_host: str = Field(default="127.0.0.1", description="Address of the admin port.")
    admin_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Second port for /metrics and /health. The main port then has no /metrics (default: no second port).",
    )
    dashboard: bool = Field(
        default=True, description="Serve the dashboard page at /dashboard and its data at /v1/dashboard, on the main port."
    )
    ssl_certfile: Path | None = Field(default=None, description="Certificate chain (PEM). If set, the main port speaks TLS.")
    ssl_keyfile: Path | None = Field(
        default=None, description="Private key (PEM) of --ssl-certfile, if it is not in the same file."
    )
    ssl_ca_certs: Path | None = Field(
        default=None,
        description="Certificate authorities (PEM). If set, clients must present a certificate signed by one of them.",
    )
    gguf_file: str | None = Field(
        default=None, description="Read the base model's weights from this GGUF file in its folder."
    )
    allow_pickle: bool = Field(
        default=False, description="Accept base models whose weights are PyTorch pickle files (read with weights_only)."
    )
    data_dir: Path | None = Field(
        default=None,
        description="Folder for the server's own files (default: scalabl in $XDG_DATA_HOME or ~/.local/share).",
    )
    outcomes_url: SecretStr | None = Field(
        default=None,
        description="Outcomes database, which stores predictions and their labels: sqlite:////file, "
        "postgresql://user@host/name, or none to store nothing (default: the SQLite file outcomes.db in the data folder).",
    )
    outcomes_required: bool = Field(
        default=False,
        description="If a prediction cannot be stored, answer with 503 (default: answer the prediction with recorded: "
        "false).",
    )
    outcomes_timeout: float = Field(default=2.0, gt=0, description="Seconds that a request waits for the outcomes database.")
    outcomes_retention_days: float = Field(
        default=90.0, gt=0, description="Days after which a stored prediction is deleted."
    )
    outcomes_max_rows: int = Field(
        default=1_000_000,
        ge=1,
        lt=2**62,
        description="Largest number of stored predictions. Above it, the oldest are deleted.",
    )
    store_inputs: bool = Field(default=False, description="Store the text of each input, not only its hash.")
    input_hash_key: SecretStr | None = Field(
        default=None,
        description="Key for hashing inputs with HMAC-SHA-256 (default: plain SHA-256, from which short texts can be "
        "guessed).",
    )
    replica_id: str | None = Field(
        default=None,
        min_length=1,
        description="Name under which this replica's counters are stored, so that they continue after a restart "
        "(default: host:port).",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the base model.")
    log_format: LogFormat = Field(
        default="text", description="Format of the log on standard error: text or json, one line per record."
    )
    otlp_endpoint: str | None = Field(
        default=None,
        description="URL of an OpenTelemetry collector (OTLP over HTTP) that gets the spans of requests: http://host:4318.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lowest level of messages to log."
    )

    @field_validator("adapters")
    @classmethod
    def _adapters_have_names(cls, adapters: str | None) -> str | None:
        names = [name for name, _ in _pairs(adapters)]
        for name, folder in _pairs(adapters):
            if not re.fullmatch(ADAPTER_NAME, name):
                raise ValueError(
                    f"{name!r} is not a valid adapter name; write name=folder, with a name of at most 64 letters, digits, "
                    "'.', '_' and '-' that begins with a letter or digit"
                )
            if not folder:
                raise ValueError(f"{name!r} has no folder; write name=folder")
            if names.count(name) > 1:
                raise ValueError(f"the name {name!r} is used twice; give each adapter its own name")
        return adapters

    @model_validator(mode="after")
    def _adapter_names_differ(self) -> Self:
        if self.default_adapter in dict(_pairs(self.adapters)):
            raise ValueError(f"--adapters: {self.default_adapter!r} is already the name of --adapter; choose another name")
        return self

    @model_validator(mode="after")
    def _device_map_excludes_device(self) -> Self:
        if self.device_map is not None and self.device != "auto":
            raise ValueError("--device-map and --device cannot be combined; leave --device out")
        return self

    @model_validator(mode="after")
    def _probe_file_needs_quantization(self) -> Self:
        if self.probe_file is not None and self.quantization is None:
            raise ValueError("--probe-file has an effect only with --quantization, which is not set")
        return self

    @model_validator(mode="after")
    def _adapters_have_a_root(self) -> Self:
        if self.enable_adapter_loading and self.adapter_root is None:
            raise ValueError("--enable-adapter-loading needs --adapter-root, the folder from which adapters may be loaded")
        return self

    @model_validator(mode="after")
    def _engine_has_a_url(self) -> Self:
        if (self.engine == "vllm") != (self.engine_url is not None):
            raise ValueError("--engine vllm and --engine-url need each other: set both or neither")
        if self.engine == "vllm" and self.quantization is not None:
            raise ValueError("--quantization cannot be used with --engine vllm; set it on the vLLM servers instead")
        if self.engine == "vllm" and self.device_map is not None:
            raise ValueError(
                "--device-map works only with --engine transformers; split the model with flags of the vLLM servers"
            )
        for url in self.engine_urls:
            if not re.match(r"https?://[^/\s]", url):
                raise ValueError(f"--engine-url: {url!r} is not a URL; write comma-separated http://host:port")
        return self

    @property
    def engine_urls(self) -> list[str]:
        """The URLs of the vLLM servers."""
        return [url.strip() for url in (self.engine_url or "").split(",") if url.strip()]

    @property
    def data_folder(self) -> Path:
        """The folder for the server's own files."""
        return self.data_dir or Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "scalabl"

    @property
    def default_adapter(self) -> str:
        """The name of the adapter that answers when a request names none."""
        return self.adapter_name or self.adapter.resolve().name

    @property
    def queue_tokens(self) -> int:
        """The largest number of tokens in the queue."""
        return self.max_queue_tokens or 64 * self.max_batch_tokens

    def longest_prompt(self, supported: int | None) -> int:
        """The longest allowed prompt in tokens.

        Args:
            supported: the base model's own limit; None if it has none, so that only the size of a pass limits a prompt.
        """
        limits = [limit for limit in (self.max_input_tokens, supported) if limit is not None]
        return min(limits, default=self.max_batch_tokens)

    def longest_text(self, max_tokens: int) -> int:
        """The longest allowed text in characters, when the longest prompt has `max_tokens` tokens."""
        return self.max_input_chars or LONGEST_TOKEN * max_tokens

    def adapter_folders(self) -> dict[str, Path]:
        """Name -> folder of every adapter to load at start-up, the default adapter first."""
        return {self.default_adapter: self.adapter} | {name: Path(folder) for name, folder in _pairs(self.adapters)}

    def resolved_outcomes_url(self) -> str | None:
        """The URL of the outcomes database, None when nothing is stored."""
        if self.outcomes_url is not None:
            url = self.outcomes_url.get_secret_value()
            return None if url == "none" else url
        return f"sqlite:///{self.data_folder.absolute() / 'outcomes.db'}"


def _pairs(adapters: str | None) -> list[tuple[str, str]]:
    """(name, folder) pairs of `--adapters`; the folder is empty where a part has no `=`."""
    parts = [part.strip() for part in (adapters or "").split(",") if part.strip()]
    return [(name.strip(), folder.strip()) for name, _, folder in (part.partition("=") for part in parts)]
