"""What is measured on: `kind.py` says what a kind of device provides, `registry.py` lists the kinds that there are."""
