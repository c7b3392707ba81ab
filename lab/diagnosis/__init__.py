"""From metrics to symptoms, from symptoms to causes. Knows no probe and no fault by name."""
