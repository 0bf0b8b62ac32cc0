"""Tools for developing this project: checks of pins, of releases, and on other versions of torch."""
