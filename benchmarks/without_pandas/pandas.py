"""Stands in pandas' place where a server shall find none, as after `make setup`."""

raise ImportError("pandas is left out on purpose")
