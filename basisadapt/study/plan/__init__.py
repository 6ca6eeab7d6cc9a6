"""Plans: studies with their cells, tuning, search spaces and claims."""
