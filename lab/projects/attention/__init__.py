"""Project 7: see component.py."""
