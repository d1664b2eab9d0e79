"""Training programs. They need torch (extra `train`) and are never imported by the engine."""
