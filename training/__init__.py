"""How the demo checkpoint `scenes-64` was made: the world, and one module a training stage.

`python -m examples.scenes.train` runs all stages; with `--data` they train on captioned pictures instead.
"""
