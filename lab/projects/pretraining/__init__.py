"""Project 16: see component.py."""
