"""What the two defences add to training."""
