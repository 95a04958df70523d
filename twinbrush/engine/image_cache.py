"""Finished image files by the request that they were made for, in bounded memory.

Holds those of deterministic requests, whose bytes depend on nothing else. Knows nothing of how
images are made.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace

from twinbrush.engine.request import GenerationRequest

# Fields that say when and with what events an image is delivered, not its bytes.
DELIVERY = {
    "priority": "normal", "deadline_ms": 0, "client": "", "progress": False, "preview_every": 0,
}  # fmt: skip


class ImageCache:
    """The files that were asked for last; from any thread.

    Args:
        most_bytes: that the files may have together; 0 keeps none.
    """

    def __init__(self, most_bytes: int):
        self._most_bytes = most_bytes
        self._files: OrderedDict[GenerationRequest, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def holds(self, request: GenerationRequest) -> bool:
        """Whether files of such a request are kept."""
        return self._most_bytes > 0 and request.deterministic

    def get(self, request: GenerationRequest) -> list[bytes]:
        """The files of all images of the request by index; empty if one of them is not here."""
        keys = [_key(request, index) for index in range(request.num_images)]
        with self._lock:
            if not all(key in self._files for key in keys):
                return []
            for key in keys:
                self._files.move_to_end(key)
            return [self._files[key] for key in keys]

    def add(self, request: GenerationRequest, index: int, file: bytes) -> None:
        """Keeps the file of image `index`; those asked for longest ago make room for it."""
        if not self.holds(request) or len(file) > self._most_bytes:
            return
        key = _key(request, index)
        with self._lock:
            self._bytes += len(file) - len(self._files.pop(key, b""))
            self._files[key] = file
            while self._bytes > self._most_bytes:
                self._bytes -= len(self._files.popitem(last=False)[1])


def _key(request: GenerationRequest, index: int) -> GenerationRequest:
    """The request of that image alone."""
    return replace(request, seed=request.seed + index, num_images=1, **DELIVERY)
