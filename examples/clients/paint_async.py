"""Paints many prompts at once, and cancels one request after its first step."""

import asyncio
import os

from twinbrush_client import AsyncClient, Cancelled

SERVER = os.environ.get("TWINBRUSH_SERVER", "127.0.0.1:8001")
COLOURS = ["red", "green", "blue", "yellow"]


async def main() -> None:
    async with AsyncClient(SERVER) as client:
        requests = [client.generate(f"a {colour} circle", seed=7) for colour in COLOURS]
        for colour, (image,) in zip(COLOURS, await asyncio.gather(*requests), strict=True):
            image.save(f"{colour}.png")
        stream = client.stream("a purple square", steps=50)
        try:
            async for event in stream:
                print(event)
                stream.cancel()  # the server frees the rows before its next step
        except Cancelled:
            print("cancelled")


asyncio.run(main())
