"""How a module acts inside somebody else's model: sites, hooks, capture, replay, fingerprints."""
