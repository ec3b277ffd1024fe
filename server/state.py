"""What every endpoint finds on the application: the engine, the settings, the metrics."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import HTTPConnection

from quire.server.engine_client import EngineClient
from quire.server.metrics import ServerMetrics
from quire.server.settings import ServerSettings


@dataclass
class ServerState:
    """One server's parts."""

    settings: ServerSettings
    engine: EngineClient
    metrics: ServerMetrics
    model_name: str
    chat_template: str | None

    @property
    def is_draining(self) -> bool:
        """Whether it has been told to stop, and only ends what is open."""
        return self.engine.is_draining


def state_of(connection: HTTPConnection) -> ServerState:
    """The state of the server that a request came to."""
    state: ServerState = connection.app.state.quire
    return state
