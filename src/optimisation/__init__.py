"""How weights are updated: optimisers, images in random order, several processes."""
