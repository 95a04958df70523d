"""How the demo checkpoint `scenes-64` was made: the world, and one module a training stage."""
