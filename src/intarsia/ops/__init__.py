"""The mathematics, one op a file; every op has a float64 reference that it is tested against."""
