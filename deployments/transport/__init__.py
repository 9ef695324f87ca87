"""A call to a replica: which one, over Ray Serve's handle or the local socket, and what a failure means."""
