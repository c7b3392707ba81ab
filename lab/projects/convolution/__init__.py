"""Project 5: convolution."""
