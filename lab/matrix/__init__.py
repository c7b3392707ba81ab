"""The matrix: every fault in every project where it applies, beside healthy runs; what was found, named and placed."""
