"""Shapes of objects, apart from models and images: polygons, masks of single objects, and projections."""
