"""Project 6: recurrent networks."""
