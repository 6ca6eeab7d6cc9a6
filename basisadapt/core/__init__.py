"""What every other package builds on: errors, settings, registries, redaction. It imports none of them."""
