"""gigaxt: vision models trained and run end to end on images far larger than GPU memory."""
