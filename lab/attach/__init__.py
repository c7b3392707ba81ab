"""The same probes and the same diagnosis on training that the lab did not write."""
