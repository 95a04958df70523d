"""The toy world `scenes-64`: its pictures, their reader, and how its checkpoint was trained."""
