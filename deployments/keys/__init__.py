"""Who may ask, and how much: the key file, limits, what was used."""
