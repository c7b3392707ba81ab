"""Project 17: see component.py."""
