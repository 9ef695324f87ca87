"""The HTTP application over fake engines in this process."""
