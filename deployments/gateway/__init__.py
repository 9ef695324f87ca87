"""From an HTTP request to a handle call and back."""
