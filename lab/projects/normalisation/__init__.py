"""Project 12: see component.py."""
