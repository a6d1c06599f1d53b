"""How networks run fast: other forms of the same function, and the votes under noise."""
