"""Project 18: see component.py."""
