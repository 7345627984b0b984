"""What is told of a run: records, the report, and where a number comes from."""
