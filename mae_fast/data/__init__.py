"""Images in: sources, keyed augmentation, decoding, batches."""
