"""How modules are trained: recipes, objectives, pseudo-labels, checkpoints."""
