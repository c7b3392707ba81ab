"""Project 3: see component.py."""
