"""Project 10: see component.py."""
