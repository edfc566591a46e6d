"""Steps from a picture of any kind to values in [-1, 1]: opening, values, geometry."""
