"""Project 15: see component.py."""
