"""Project 14: see component.py."""
