"""A plan becomes a model."""
