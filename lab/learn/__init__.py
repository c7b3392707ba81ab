"""The learner's loop: build a stub, check it against the spec, keep progress."""
