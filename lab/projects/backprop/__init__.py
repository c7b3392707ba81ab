"""Project 4: see component.py."""
