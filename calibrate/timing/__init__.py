"""How one arm is run alone on the device, and what its samples say."""
