"""How much of the gap between LR and HR each way of transfer recovers, and at what cost."""
