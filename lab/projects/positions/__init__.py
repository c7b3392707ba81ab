"""Project 11: see component.py."""
