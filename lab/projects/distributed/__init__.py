"""Project 20: see component.py."""
