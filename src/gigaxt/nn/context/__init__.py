"""Long-context encoders."""
