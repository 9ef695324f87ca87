"""What stands before Ray Serve on the tuned start: HAProxy and its guard, and who stands in for a proxy."""
