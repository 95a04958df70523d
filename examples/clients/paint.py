"""Paints a list of prompts, then follows one request while it is painted."""

import os
import sys

from twinbrush_client import Client, Picture, Preview, TwinbrushError

SERVER = os.environ.get("TWINBRUSH_SERVER", "127.0.0.1:8001")
PROMPTS = ["a small green star on black", "a large blue ring on a brown background"]

try:
    with Client(SERVER) as client:
        for number, image in enumerate(client.generate(PROMPTS, seed=7)):
            image.save(f"picture-{number}.png")
            print(f"picture-{number}.png")
        for event in client.stream(PROMPTS[0], steps=12, preview_every=4):
            if isinstance(event, Picture):
                print(f"seed {event.seed}: {len(event.data)} bytes")
            elif isinstance(event, Preview):
                print(f"preview of {event.image.width} × {event.image.height} cells")
            else:
                print(f"step {event.step} of {event.total_steps}")
except TwinbrushError as error:
    sys.exit(f"{error.code}: {error}")
