"""How good a student is: metrics, pictures and the report."""
