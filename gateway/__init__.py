"""HTTP doors of Twinbrush servers: OpenAI's images API, A1111's API, and a page.

Reaches servers through `twinbrush_client` alone; knows nothing of Triton or of the engine.
"""
