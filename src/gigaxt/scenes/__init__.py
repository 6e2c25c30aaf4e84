"""Scenes as a model sees them: at its pixel size, cut into regions, those left out that hold nothing, and loaded.

- `batch.py`: a batch of scenes, checked, cut into regions, loaded by chunks: `SceneBatch`.
- `cases.py`: what a model is given: images, or several as one case.
- `inputs.py`: what a model expects of its images; resampling and resizing to it.
- `kept.py`: regions with data and foreground; `foreground.py`: tissue, land, polygons.
- `region_pixels.py`: pixels of many regions of an image, read together.
"""
