"""Execution: where cells run (in this process, in workers) and the files in which they travel."""
