"""Benchmarks of dense features: points of two pictures, classes, depth and normals of cells."""
