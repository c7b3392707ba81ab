"""Project 8: see component.py."""
