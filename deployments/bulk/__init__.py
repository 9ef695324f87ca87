"""Patience and windows: what jobs, clients and batches share."""
