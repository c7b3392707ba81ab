"""Project 1: see component.py."""
