"""What clients write in other ways: addresses, methods, and bodies that are compressed."""
