"""What detectors find in a scene: objects whole and once, wherever the borders of regions lie."""
