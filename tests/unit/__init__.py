"""Without Ray, without a model."""
