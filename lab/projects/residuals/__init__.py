"""Project 13: see component.py."""
