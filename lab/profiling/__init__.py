"""Where time and memory go, and what to change first. Nothing here is imported unless it is asked for."""
