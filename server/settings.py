"""The server's own settings, apart from the engine's: frozen, each field with the sentence that explains its flag."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.kernels.errors import InvalidConfigError

TOOL_PARSERS = ("auto", "hermes", "llama3", "none")
ACCESS_LOGS = ("text", "json", "none")


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class ServerSettings:
    """Everything a user can set about serving. None and 0 mean "no limit" where the sentence says so."""

    host: str = _option("127.0.0.1", "Address to listen on; 0.0.0.0 for all.")
    port: int = _option(8000, "Port to listen on; 0 takes a free one, which is printed.")
    uds: Path | None = _option(None, "Unix socket to listen on in place of host and port.")
    served_model_name: str | None = _option(
        None, "Name that clients use for the model; what was given as MODEL when left out."
    )
    root_path: str = _option("", "Path under which a proxy in front serves this server.")
    ssl_certfile: Path | None = _option(None, "TLS certificate (PEM).")
    ssl_keyfile: Path | None = _option(None, "TLS key (PEM).")
    ssl_ca_certs: Path | None = _option(None, "Certificates that clients must be signed by (PEM).")
    api_keys: tuple[str, ...] = _option((), "Key that requests must bear; may be given several times.")
    api_key_file: Path | None = _option(
        None, "File with one such key a line; $QUIRE_API_KEYS has them separated by commas."
    )
    admin_keys: tuple[str, ...] = _option(
        (), "Key for /admin/scheduler, which does not exist without one; $QUIRE_ADMIN_KEYS too."
    )
    cors_origins: tuple[str, ...] = _option(
        (), "Origin whose pages may call the server; may be given several times; * is any."
    )
    max_queued_requests: int = _option(
        1024, "Requests that may wait for their first token; more are answered 429; 0: no limit."
    )
    max_queued_tokens: int = _option(0, "Prompt tokens that may wait; more are answered 429; 0: no limit.")
    max_prompt_tokens: int = _option(0, "Longest prompt that is taken, in tokens; 0: whatever fits max_model_len.")
    max_body_bytes: int = _option(16 * 2**20, "Largest request body.")
    request_timeout: float = _option(0.0, "Seconds after which a request is ended with an error; 0: never.")
    drain_timeout: float = _option(30.0, "Seconds that open requests have to end after SIGTERM.")
    engine_restarts: int = _option(0, "How often a dead engine is started again before the server gives up.")
    chat_template: Path | None = _option(None, "Jinja file with the chat template, in place of the model's own.")
    tool_parser: str = _option(
        "auto", "Format of tool calls in the model's text: auto, hermes, llama3 or none.", TOOL_PARSERS
    )
    metrics_prefix: str = _option("vllm", "Prefix of metric names; dashboards know vllm.")
    access_log: str = _option("text", "Access log: text, json or none.", ACCESS_LOGS)
    otlp_endpoint: str | None = _option(
        None, "OpenTelemetry collector (OTLP over HTTP) that traces are sent to; needs quire[otel]."
    )

    def check(self) -> None:
        """Raises InvalidConfigError for a value that cannot be."""
        for name in (
            "port",
            "max_queued_requests",
            "max_queued_tokens",
            "max_prompt_tokens",
            "max_body_bytes",
            "request_timeout",
            "drain_timeout",
            "engine_restarts",
        ):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise InvalidConfigError(f"{name} must be at least 0, not {value}")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise InvalidConfigError("TLS needs both ssl_certfile and ssl_keyfile")
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise InvalidConfigError("ssl_ca_certs needs ssl_certfile and ssl_keyfile")
        for path in (self.ssl_certfile, self.ssl_keyfile, self.ssl_ca_certs, self.chat_template):
            if path is not None and not path.is_file():
                raise InvalidConfigError(f"there is no file {path}")
        if self.root_path and not self.root_path.startswith("/"):
            raise InvalidConfigError(f"root_path begins with a slash, unlike {self.root_path!r}")
