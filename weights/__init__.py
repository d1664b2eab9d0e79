"""Weights on disk: safetensors files, checkpoint names, bundled models, training recipes."""
