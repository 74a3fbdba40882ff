"""Child processes: started, spoken to, waited for within limits, and ended, by one mechanism."""
