"""Project 2: see component.py."""
