"""Where the time of one linear goes, kernel by kernel."""
