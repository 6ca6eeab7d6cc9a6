"""Reports: tables, verdicts and figures of recorded outcomes, and their files."""
