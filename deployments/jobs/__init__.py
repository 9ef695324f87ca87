"""Files and tables, embedded row by row, so that an end costs nothing that was done."""
