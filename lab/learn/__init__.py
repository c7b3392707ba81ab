"""The learner's loop: check a component of one's own against a project's spec."""
