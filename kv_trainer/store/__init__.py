"""Teachers that have spoken: their keys and values on disk, at the student's layers and positions."""
