"""Project 19: see component.py."""
