"""One axis of the map from teacher coordinates to student coordinates a module."""
