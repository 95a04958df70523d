"""Ask a Twinbrush server for pictures, over gRPC."""

from twinbrush_client.client import Client, Stream
from twinbrush_client.wire import Picture, Preview, Progress, TwinbrushError

__all__ = ["Client", "Picture", "Preview", "Progress", "Stream", "TwinbrushError"]
