"""What a trained model is worth: reconstructions and probes."""
