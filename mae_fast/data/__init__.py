"""Loads images: sources, decoding, augmentation with keyed random numbers, batches."""
