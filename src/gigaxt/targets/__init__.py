"""What dense heads and detectors learn of a scene: each target moves with its image and is drawn region by region."""
