"""MNIST's raw files: verified, and fetched when they are missing."""
