"""A small client of OpenAI's API over aiohttp: JSON posted, server-sent events read, errors in words."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from quire.kernels.errors import NotServingError, QuireError


class ApiError(QuireError):
    """An answer that is no success. `status` is HTTP's, `retry_after` what the server asked for, in seconds."""

    def __init__(self, status: int, body: Any, retry_after: float | None = None) -> None:
        error = body.get("error") if isinstance(body, dict) else None
        message = error.get("message") if isinstance(error, dict) else str(body)[:200]
        super().__init__(f"{message} (status {status})")
        self.status = status
        self.body = body
        self.retry_after = retry_after


@dataclass(frozen=True)
class Answer:
    """HTTP status, JSON body (text where it is no JSON), and the seconds after which the server wants to be asked again."""

    status: int
    body: Any
    retry_after: float | None = None


class OpenAIClient:
    """One server. Use it as an async context manager."""

    def __init__(
        self, url: str, api_key: str | None = None, *, uds: Path | None = None, timeout: float | None = 3600.0
    ) -> None:
        """`uds` is the path of a unix socket to connect to, whatever host `url` names.

        `timeout` is how many seconds one request may take; None: any number.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._uds = uds
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> OpenAIClient:
        connector: aiohttp.BaseConnector = aiohttp.TCPConnector(limit=0)
        if self._uds is not None:
            connector = aiohttp.UnixConnector(str(self._uds), limit=0)
        self._session = aiohttp.ClientSession(
            connector=connector, headers=self._headers, timeout=aiohttp.ClientTimeout(total=self._timeout)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON body of a GET, whatever the status. Raises NotServingError where nobody answers."""
        assert self._session is not None
        try:
            async with self._session.get(self.url + path) as response:
                return response.status, await _json_of(response)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._absent(error) from error

    async def model(self) -> str:
        """The name of the model that is served."""
        status, body = await self.get("/v1/models")
        if status != 200:
            raise ApiError(status, body)
        return str(body["data"][0]["id"])

    async def send(self, path: str, body: Any, request_id: str | None = None) -> Answer:
        """Whatever a POST is answered with. `body` is bytes of JSON, or a value.

        Raises NotServingError where nobody answers, or not to the end.
        """
        assert self._session is not None
        headers = {} if request_id is None else {"x-request-id": request_id}
        given: dict[str, Any] = {"json": body}
        if isinstance(body, bytes):
            given, headers["content-type"] = {"data": body}, "application/json"
        try:
            async with self._session.post(self.url + path, headers=headers, **given) as response:
                return Answer(response.status, await _json_of(response), _retry_after(response))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._absent(error) from error

    async def post(self, path: str, body: Any) -> Any:
        """The JSON answer. Raises ApiError for any other status than 200, NotServingError where nobody answers."""
        answer = await self.send(path, body)
        if answer.status != 200:
            raise ApiError(answer.status, answer.body, answer.retry_after)
        return answer.body

    async def stream(self, path: str, body: Any) -> AsyncGenerator[bytes]:
        """The data of each event, up to and without [DONE]. Raises as `post` does, and ApiError for an error in the stream."""
        assert self._session is not None
        try:
            async with self._session.post(self.url + path, json=body) as response:
                if response.status != 200:
                    raise ApiError(response.status, await _json_of(response), _retry_after(response))
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    data = line[6:].strip()
                    if data == b"[DONE]":
                        return
                    if data.startswith(b'{"error"'):
                        raise ApiError(response.status, json.loads(data))
                    yield data
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._absent(error) from error
        raise NotServingError("the server closed the stream before its end")

    def _absent(self, error: Exception) -> NotServingError:
        where = self.url if self._uds is None else str(self._uds)
        why = str(error) or type(error).__name__
        return NotServingError(f"no server answers at {where} ({why}); start one with: quire serve")


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None


async def _json_of(response: aiohttp.ClientResponse) -> Any:
    text = await response.text()
    try:
        return json.loads(text)
    except ValueError:
        return text
