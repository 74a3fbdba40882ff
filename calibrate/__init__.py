"""The sweep harness: measures bf16 against float8 on the device at hand and writes the tables."""
