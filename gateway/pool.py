"""The servers behind the gateway: who gets the next request, and who is left alone for a while.

A request goes to the server with the least outstanding work that serves its checkpoint. What has
not begun is sent to another server where one is lost or full. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Unpack

from gateway.addresses import resolve, split
from gateway.backend import Backend
from twinbrush_client import (
    AsyncStream,
    Cancelled,
    Picture,
    QueueFull,
    ServerInfo,
    ServerUnavailable,
    TwinbrushError,
)
from twinbrush_client.errors import shown
from twinbrush_client.fields import STREAM_ONLY, RequestFields
from twinbrush_client.wire import Event

log = logging.getLogger(__name__)
PROBE_SECONDS = 2.0  # between two probes of a server


class UnknownModel(TwinbrushError):
    """No server has this checkpoint."""


class Pool:
    """Servers, by `host:port`; paints as `AsyncClient` does.

    Args:
        servers: addresses; a DNS name may stand for several servers.
        timeout: seconds that a request may take in all.
        probe_seconds: between two looks at a server.
        options: of the servers' `Connection`, such as `tls` and `headers`. A certificate must
            have the name, or the address, by which `servers` has its server.
    """

    def __init__(
        self,
        servers: Sequence[str],
        timeout: float,
        probe_seconds: float = PROBE_SECONDS,
        options: Mapping[str, Any] | None = None,
    ):
        self._options = dict(options or {})
        self._servers, self._timeout, self._probe_seconds = tuple(servers), timeout, probe_seconds
        self._backends: dict[str, Backend] = {}
        self._addresses: dict[str, list[str]] = {}  # of each server, as DNS had them last
        self._unknown: set[str] = set()  # servers whose names DNS did not have last
        self._jobs: set[Job] = set()
        self._turns = itertools.count(1)
        self._probing: asyncio.Task | None = None
        self.closing = False

    async def start(self) -> None:
        """Looks at every server once, and then from time to time."""
        await self.probe()
        self._probing = asyncio.create_task(self._probe_for_ever())

    async def close(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
        for backend in self._backends.values():
            await backend.client.close()

    @property
    def backends(self) -> list[Backend]:
        return list(self._backends.values())

    @property
    def ready(self) -> bool:
        return any(backend.healthy for backend in self.backends)

    def models(self) -> dict[str, Backend]:
        """A server of each checkpoint, by its name; the first is the default."""
        named: dict[str, Backend] = {}
        for backend in self.backends:
            if backend.checkpoint is not None:
                named.setdefault(backend.checkpoint, backend)
        return named

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each checkpoint, by its name; "" where a server does not say."""
        return {
            name: backend.info.checkpoint_hash if backend.info else ""
            for name, backend in self.models().items()
        }

    async def info(self, model: str | None = None) -> ServerInfo:
        """What a checkpoint's server serves; of the first one, without a name.

        Raises:
            UnknownModel: no server has it.
            ServerUnavailable: no server has answered yet.
        """
        models = self.models()
        if not models:
            await self.probe()
            models = self.models()
        found = next(iter(models.values()), None) if model is None else models.get(model)
        if found is None and model is not None and models:
            raise unknown_model(model, models)
        if found is None or found.info is None:
            raise ServerUnavailable("UNAVAILABLE", "no server answers", self._probe_seconds)
        return found.info

    def stream(
        self,
        prompt: str,
        *,
        model: str | None = None,
        request_id: str | None = None,
        timeout: float | None = None,
        **fields: Unpack[RequestFields],
    ) -> Job:
        """A request's events, as `AsyncClient.stream` has them, from the server that is best.

        One picture without progress is asked for by `AsyncClient.pictures`, which costs less.
        """
        job = Job(self, prompt, model, {"request_id": request_id, "timeout": timeout, **fields})
        self._jobs.add(job)
        return job

    def cancel_all(self) -> None:
        """Ends the live requests, for good: they raise `ServerUnavailable`."""
        self.closing = True
        for job in list(self._jobs):
            job.cancel()

    async def probe(self) -> None:
        """Looks at every server, also at those that DNS has new."""
        await self._resolve()
        await asyncio.gather(*(backend.probe() for backend in self.backends))

    def choose(self, model: str | None, tried: set[str]) -> Backend | None:
        """The best server of a checkpoint that was not tried yet.

        Ejected ones are the last resort: they may be back before the next probe says so.
        """
        model = model or next(iter(self.models()), None)
        suitable = [
            backend
            for backend in self.backends
            if backend.address not in tried and backend.checkpoint in (model, None)
        ]
        if not suitable:
            return None
        best = min(suitable, key=lambda b: (not b.healthy, b.outstanding, b.turn))
        best.turn = next(self._turns)
        return best

    def forget(self, job: Job) -> None:
        self._jobs.discard(job)

    async def _probe_for_ever(self) -> None:
        failing = False
        while True:
            await asyncio.sleep(self._probe_seconds)
            try:
                await self.probe()
                failing = False
            except Exception:  # of one round; the next one may do
                if not failing:
                    log.exception("looking at the servers fails")
                failing = True

    async def _resolve(self) -> None:
        for server in self._servers:
            try:
                self._addresses[server] = await resolve(server)
                self._unknown.discard(server)
            except OSError as error:
                if server not in self._unknown:  # once, not at every look
                    log.warning("the name of %s is not known: %s", server, error)
                self._unknown.add(server)
        found = {address for addresses in self._addresses.values() for address in addresses}
        for server in self._servers:
            for address in self._addresses.get(server, ()):
                if address not in self._backends:
                    name = None if address == server else split(server)[0]
                    options = self._options | {"server_name": name}
                    self._backends[address] = Backend(address, self._timeout, options)
        for address, backend in list(self._backends.items()):
            if address not in found and not backend.outstanding:
                del self._backends[address]
                await backend.client.close()


class Job:
    """One request's events, in order; `cancel` ends it. Iterate over it once."""

    def __init__(self, pool: Pool, prompt: str, model: str | None, arguments: Mapping[str, Any]):
        self._pool, self._prompt, self._model = pool, prompt, model
        self._arguments = arguments
        self._call: AsyncStream | asyncio.Task[list[Picture]] | None = None
        self._cancelled = False

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            async with contextlib.aclosing(self._events()) as events:
                async for event in events:
                    yield event
        except Cancelled:
            if not self._pool.closing:
                raise
            text = "the gateway is shutting down"
            raise ServerUnavailable("UNAVAILABLE", text) from None
        finally:
            self.cancel()
            self._pool.forget(self)

    def cancel(self) -> None:
        """Ends the request; an iteration then raises `Cancelled`."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Job:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.cancel()

    async def _events(self) -> AsyncGenerator[Event, None]:
        work = work_of(self._arguments, await self._pool.info(self._model))
        tried: set[str] = set()
        failures: list[TwinbrushError] = []
        while backend := self._pool.choose(self._model, tried):
            tried.add(backend.address)
            began = False
            try:
                with backend.working(work):
                    async with contextlib.aclosing(self._from(backend)) as events:
                        async for event in events:
                            began = True
                            yield event
            except (ServerUnavailable, QueueFull) as error:
                if isinstance(error, ServerUnavailable):
                    backend.eject()
                    log.warning("%s is left alone for a while: %s", backend.address, error)
                if began:
                    raise
                failures.append(error)
            else:
                backend.succeeded()
                return
        raise _best(failures)

    async def _from(self, backend: Backend) -> AsyncGenerator[Event, None]:
        if self._cancelled:
            raise Cancelled("CANCELLED", "the request was cancelled")
        given = self._arguments
        if given.get("progress") is not False or given.get("num_images") != 1:
            self._call = backend.client.stream(self._prompt, **given)
            async for event in self._call:
                yield event
            return
        fields = {name: value for name, value in given.items() if name not in STREAM_ONLY}
        self._call = asyncio.create_task(backend.client.pictures(self._prompt, **fields))
        try:
            pictures = await self._call
        except asyncio.CancelledError:  # the call's, or the task's own
            if not self._cancelled:
                raise
            raise Cancelled("CANCELLED", "the request was cancelled") from None
        for picture in pictures:
            yield picture


def work_of(fields: Mapping[str, Any], info: ServerInfo) -> float:
    """A request's work: steps of pictures at the checkpoint's native size."""

    def value(name: str) -> float:
        given = fields.get(name)
        return float(info.defaults[name] if given is None else given)

    pixels = value("width") * value("height") / info.sizes["native"] ** 2
    return value("num_images") * value("steps") * pixels


def unknown_model(name: str, served: Iterable[str]) -> UnknownModel:
    """The error of a request for a checkpoint that no server has."""
    text = f"The model {shown(name)} does not exist; served are {', '.join(served) or 'none'}."
    return UnknownModel("NOT_FOUND", text)


def _best(failures: Sequence[TwinbrushError]) -> TwinbrushError:
    """Of what all servers said: a full queue will have room again, and says when."""
    full = [failure for failure in failures if isinstance(failure, QueueFull)]
    if full:
        return min(full, key=lambda failure: failure.retry_after or 0.0)
    if failures:
        return failures[-1]
    return ServerUnavailable("UNAVAILABLE", "no server answers")
