"""Architectures, one file per family, and the frame that all of them share."""
