"""What exists: pixels on disk and in memory, read window by window."""
