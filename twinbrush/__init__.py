"""What runs inside the server: text-to-image generation by step batching.

Needs numpy, tokenizers and pillow. Neither torch nor Triton is imported here.
"""

__version__ = "0.2.0"
