"""Wire formats, one file per dialect. Knows neither Ray nor engines."""
