"""raydeep: augment, train, compress and search image classifiers on Ray, from one job file."""

__version__ = "0.1.0"
