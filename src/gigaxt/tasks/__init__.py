"""Loss, metrics and decoding for one kind of answer each."""
