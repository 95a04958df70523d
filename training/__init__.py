"""Training of the checkpoints that `export` takes, one module a stage.

`fusion` trains the one new part of a checkpoint that exists: the fusion head between its CLIP and a
text model. `clip`, `bert`, `vqgan`, `diffusion` and `distill` train a small checkpoint from random
weights, and `recover` what pruning took away. All train on captioned pictures from `--data`.
"""
