"""The embedded data sets, and prompt tables in Parquet."""
