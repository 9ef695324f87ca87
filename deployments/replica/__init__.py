"""One engine in one Ray Serve replica."""
