"""Drivers: the engine that runs studies, searches, and the exchange of cells between machines."""
