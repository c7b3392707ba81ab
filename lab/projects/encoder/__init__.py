"""Project 9: see component.py."""
