"""Client of a Twinbrush server, over gRPC: `Client`, `AsyncClient`, and the errors they raise."""

from twinbrush_client.aio import AsyncClient, AsyncStream
from twinbrush_client.client import Client, Stream
from twinbrush_client.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    ServerUnavailable,
    TwinbrushError,
)
from twinbrush_client.wire import Picture, Preview, Progress, ServerInfo

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "InvalidRequest",
    "Picture",
    "Preview",
    "Progress",
    "QueueFull",
    "ServerInfo",
    "ServerUnavailable",
    "Stream",
    "TwinbrushError",
]
